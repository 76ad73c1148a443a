"""From the micro-batches of the loader to the loss of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pomscale.base.condition import Condition, Text, map_condition
from pomscale.config.model import VideoModelConfig
from pomscale.config.train import TrainRecipe
from pomscale.data.bad_samples import BadSample
from pomscale.data.loader import Loader, MicroBatch
from pomscale.data.normalize import normalize
from pomscale.data.texts import null_text, text_batch
from pomscale.diffusion.draws import draw
from pomscale.diffusion.objectives import Objective, per_sample_loss
from pomscale.shards.schema import Normalization, TextInfo


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """A micro-batch with everything random drawn. Shapes: x0, eps (b, c, h, w) or (b, c, f, h, w); weights (b,).

    `x0` is as the loader gives it: not normalised, mostly float16. `t`, `start`: see diffusion.draws; `start` is None
    for a network of pictures. `bad`: the samples that could not be read; their weight is 0.
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    condition: Condition
    start: Tensor | None
    weights: Tensor
    bad: tuple[BadSample, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> TrainBatch:
        return TrainBatch(
            function(self.x0),
            function(self.eps),
            function(self.t),
            map_condition(self.condition, function),
            None if self.start is None else function(self.start),
            function(self.weights),
            self.bad,
        )

    def pin_memory(self) -> TrainBatch:
        """Called by the loader's pinning thread."""
        return self.map(_pinned)

    def to(self, device: torch.device) -> TrainBatch:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def _pinned(tensor: Tensor) -> Tensor:
    """A copy without gaps between rows, which latents have and Tensor.pin_memory would keep: a device cannot fetch it
    while the host goes on otherwise.
    """
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def draw_batch(recipe: TrainRecipe, batch: MicroBatch, texts: TextInfo | None) -> TrainBatch:
    """Runs in the loader's threads, so that drawing noise never keeps a GPU waiting. texts: of the captions."""
    shape, model = tuple(batch.latents.shape[1:]), recipe.model
    if isinstance(model, VideoModelConfig):
        assert texts is not None
        num_groups = max(1, shape[1] // model.patch_frames) if len(shape) == 4 else 1
        draws = draw(recipe.seed, batch.positions.tolist(), shape, recipe.diffusion, num_groups)
        condition: Condition = _drop_texts(text_batch(batch, texts), draws.drop_condition, texts)
        return TrainBatch(batch.latents, draws.eps, draws.t, condition, draws.start, batch.weights, batch.bad)
    draws = draw(recipe.seed, batch.positions.tolist(), shape, recipe.diffusion)
    condition = torch.where(draws.drop_condition, model.num_classes, batch.condition)
    return TrainBatch(batch.latents, draws.eps, draws.t, condition, None, batch.weights, batch.bad)


def _drop_texts(text: Text, dropped: Tensor, texts: TextInfo) -> Text:
    """The stored embedding of the empty caption in place of those that are dropped."""
    null = null_text(texts)
    rows = dropped[:, None]
    return Text(
        torch.where(rows[..., None], null.embeddings.to(text.embeddings.dtype), text.embeddings),
        torch.where(rows, null.mask, text.mask),
    )


def steps(loader: Loader[TrainBatch]) -> Iterator[list[TrainBatch]]:
    """The micro-batches of one rank, step by step."""
    while True:
        yield [next(loader) for _ in range(loader.num_micro_batches)]


def share_of_loss(
    objective: Objective,
    normalization: Normalization,
    global_batch: int,
    device: torch.device,
    model: nn.Module,
    batch: TrainBatch,
) -> Tensor:
    """The micro-batch's share of the mean over the global batch, scalar fp32."""
    batch = batch.to(device)
    x0 = normalize(batch.x0, normalization)
    network = model if batch.start is None else partial(model, start=batch.start)
    losses = per_sample_loss(objective, network, x0, batch.eps, batch.t, batch.condition)
    return (losses * batch.weights).sum() / global_batch
