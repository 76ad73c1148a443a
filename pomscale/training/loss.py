"""The loss of training: micro-batches of the loader, what is drawn for them, and their share of the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from pomscale.base.condition import Condition, Text, map_condition
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.time_shift import time_shift
from pomscale.config.train import AlignmentLossConfig, TrainRecipe
from pomscale.data.bad_samples import BadSample
from pomscale.data.loader import MicroBatch
from pomscale.data.normalize import normalize
from pomscale.data.texts import null_text, text_batch
from pomscale.diffusion.alignment import AlignedNetwork, alignment_loss
from pomscale.diffusion.draws import Draws, draw, dropout_seeds
from pomscale.diffusion.objectives import Objective, per_sample_loss
from pomscale.distributed.sequence_parallel import SequenceRanks
from pomscale.distributed.world import World
from pomscale.models import latent_tokens
from pomscale.ops.pom import SplitTokens, TokenSplit
from pomscale.shards.schema import Normalization, TextInfo


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """A micro-batch with everything random drawn. Shapes: x0, eps (b, c, h, w) or (b, c, f, h, w); weights (b,).

    x0: as the loader gives it, not normalised, mostly float16, uint8 for pixels. t, start: see diffusion.draws;
    pictures have no start.
    bad: the samples that could not be read; their weight is 0. dropout_seeds: (b,) int64, None without dropout.
    features: (a, n, d) float16, a teacher's, of the first a samples, which have the alignment loss; None without it.
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    condition: Condition
    start: Tensor | None
    weights: Tensor
    bad: tuple[BadSample, ...]
    dropout_seeds: Tensor | None = None
    features: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> TrainBatch:
        """The same batch with `function` applied to each of its tensors."""
        return TrainBatch(
            function(self.x0),
            function(self.eps),
            function(self.t),
            map_condition(self.condition, function),
            None if self.start is None else function(self.start),
            function(self.weights),
            self.bad,
            None if self.dropout_seeds is None else function(self.dropout_seeds),
            None if self.features is None else function(self.features),
        )

    def pin_memory(self) -> TrainBatch:
        """The same batch in pinned memory. The loader's pinning thread calls it."""
        return self.map(pinned)

    def to(self, device: torch.device) -> TrainBatch:
        """The same batch on `device`; a copy from pinned memory does not wait."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory without gaps between rows; the tensor itself, where it is that already, as pixels are.

    Latents have such gaps, and Tensor.pin_memory would keep them: then the host waits while a device fetches the copy.
    """
    if tensor.is_pinned() and tensor.is_contiguous():
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def draw_batch(recipe: TrainRecipe, batch: MicroBatch, texts: TextInfo | None) -> TrainBatch:
    """Draw noise, times and dropped conditions for a micro-batch. texts: about the captions, None without them.

    It runs in the loader's threads, so that drawing noise never keeps a GPU waiting.
    """
    model, draws = recipe.model, draw_sample_numbers(recipe, batch)
    features = None if recipe.diffusion.alignment is None else aligned_features(recipe.diffusion.alignment, batch)
    start = draws.start if isinstance(model, VideoModelConfig) else None
    if isinstance(model, ImageModelConfig) and model.num_classes is not None:
        condition: Condition = torch.where(draws.drop_condition, model.num_classes, batch.condition)
    else:
        assert texts is not None
        condition = _drop_texts(text_batch(batch, texts), draws.drop_condition, texts)
    seeds = draws.dropout_seeds
    return TrainBatch(batch.latents, draws.eps, draws.t, condition, start, batch.weights, batch.bad, seeds, features)


def draw_sample_numbers(recipe: TrainRecipe, batch: MicroBatch) -> Draws:
    """Draw the random numbers of samples of one shape, each keyed by its position, and nothing else."""
    shape, model, positions = tuple(batch.latents.shape[1:]), recipe.model, batch.positions.tolist()
    num_groups = 1
    if isinstance(model, VideoModelConfig) and len(shape) == 4:
        num_groups = max(1, shape[1] // model.patch_frames)
    shift = time_shift(recipe.diffusion, model, shape)
    draws = draw(recipe.seed, positions, shape, recipe.diffusion, num_groups, shift)
    return draws if model.dropout is None else replace(draws, dropout_seeds=dropout_seeds(recipe.seed, positions))


def aligned_features(config: AlignmentLossConfig, batch: MicroBatch) -> Tensor:
    """Return the features of the samples of a micro-batch that have the alignment loss: the first ones, maybe none."""
    assert batch.features is not None, "TrainRecipe demands them"
    until = config.until_samples
    return batch.features if until is None else batch.features[: int((batch.positions < until).sum())]


def _drop_texts(text: Text, dropped: Tensor, texts: TextInfo) -> Text:
    """Replace the captions that are dropped by the stored embedding of the empty caption. dropped: (b,) bool."""
    null = null_text(texts)
    rows = dropped[:, None]
    return Text(
        torch.where(rows[..., None], null.embeddings.to(text.embeddings.dtype), text.embeddings),
        torch.where(rows, null.mask, text.mask),
    )


@dataclass(frozen=True)
class LocalTokens:
    """The tokens of every sample that this rank predicts (sequence parallelism). model: config of the network."""

    model: ImageModelConfig | VideoModelConfig
    split: SplitTokens

    @classmethod
    def of(cls, recipe: TrainRecipe, world: World) -> LocalTokens | None:
        """Return those of this rank, where several share the tokens of a sample; else None. A collective."""
        ranks = SequenceRanks.of(world, recipe.mesh.sp)
        if ranks is None:
            return None
        split = partial(TokenSplit.even, num_ranks=ranks.size, rank=ranks.rank, collectives=ranks.collectives)
        return cls(recipe.model, split)

    def part(self, target: Tensor) -> Tensor:
        """Return those tokens (b n values) of latents."""
        tokens = latent_tokens(self.model, target)
        return tokens[:, self.split(tokens.shape[1]).tokens]


def share_of_loss(
    objective: Objective,
    normalization: Normalization,
    global_batch: int,
    device: torch.device,
    local: LocalTokens | None,
    model: nn.Module,
    batch: TrainBatch,
    *,
    alignment_weight: float = 0.0,
) -> Tensor:
    """A micro-batch's share of the mean loss over the global batch, a scalar in fp32.

    The sum over the micro-batches of all ranks is the loss of the step; `local` says which tokens this rank has, None =
    all of its samples'. Where the batch has features, the result is a vector, of which the first has a gradient: the
    loss, which is that of diffusion plus `alignment_weight` times that of alignment; the diffusion loss; the alignment
    loss; the share of the samples that have the alignment loss.
    """
    batch = batch.to(device)
    x0 = normalize(batch.x0, normalization)
    network = model if batch.start is None else partial(model, start=batch.start)
    if batch.dropout_seeds is not None:
        network = partial(network, dropout_seeds=batch.dropout_seeds)
    if batch.features is not None:
        aligned = AlignedNetwork(network, len(batch.features))
        losses = per_sample_loss(objective, aligned, x0, batch.eps, batch.t, batch.condition)
        weights = batch.weights[: len(batch.features)]
        diffusion = (losses * batch.weights).sum() / global_batch
        alignment = (alignment_loss(aligned.projected, batch.features) * weights).sum() / global_batch
        total = diffusion + alignment_weight * alignment
        return torch.stack([total, diffusion.detach(), alignment.detach(), weights.sum() / global_batch])
    if local is None:
        losses = per_sample_loss(objective, network, x0, batch.eps, batch.t, batch.condition)
    else:
        network = partial(network, split_tokens=local.split)
        losses = per_sample_loss(objective, network, x0, batch.eps, batch.t, batch.condition, local.part)
    return (losses * batch.weights).sum() / global_batch


def spoil_gradient_if_not_finite(
    loss: Callable[[nn.Module, TrainBatch], Tensor], model: nn.Module, batch: TrainBatch
) -> Tensor:
    """Return `loss(model, batch)`; where that is not finite, its gradient is not finite either.

    A loss may overflow while its gradient does not. The engine leaves out a step by its gradient alone, and must leave
    out the steps that Divergence does not let count.
    """
    value = loss(model, batch)
    return value * (1 + 0 * value.detach())  # 0 * inf is nan
