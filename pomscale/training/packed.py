"""The loss of packed samples: micro-batches of the packed loader, what is drawn for them, and their share of the loss.

Every sample has the noise, time, dropped condition and seeds that it would have in a batch of its shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pomscale.base.condition import PackedText
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.train import TrainRecipe
from pomscale.data.bad_samples import BadSample
from pomscale.data.loader import MicroBatch
from pomscale.data.normalize import normalize
from pomscale.data.packed_loader import PackedMicroBatch, StepPart
from pomscale.data.readers.texts import null_embedding
from pomscale.diffusion.objectives import Objective, interpolate, prediction_loss
from pomscale.shards.schema import Normalization, TextInfo
from pomscale.training.loss import draw_sample_numbers, pinned


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A packed micro-batch with everything random drawn, of s shapes, b_1 + .. + b_s = b samples.

    x0, eps, t: of each shape, as in TrainBatch. condition: (b,) int64, or texts. start, dropout_seeds, weights,
    positions: (b,); pictures have no start. bad: the samples that could not be read; their weight is 0.
    """

    x0: tuple[Tensor, ...]
    eps: tuple[Tensor, ...]
    t: tuple[Tensor, ...]
    condition: Tensor | PackedText
    start: Tensor | None
    dropout_seeds: Tensor | None
    weights: Tensor
    positions: Tensor
    bad: tuple[BadSample, ...]
    step: StepPart

    def map(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The same batch with `function` applied to each of its tensors."""
        condition = self.condition
        return PackedBatch(
            tuple(map(function, self.x0)),
            tuple(map(function, self.eps)),
            tuple(map(function, self.t)),
            condition._replace(embeddings=function(condition.embeddings))
            if isinstance(condition, PackedText)
            else function(condition),
            None if self.start is None else function(self.start),
            None if self.dropout_seeds is None else function(self.dropout_seeds),
            function(self.weights),
            function(self.positions),
            self.bad,
            self.step,
        )

    def pin_memory(self) -> PackedBatch:
        """The same batch in pinned memory. The loader's pinning thread calls it."""
        return self.map(pinned)

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`; a copy from pinned memory does not wait."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def first(self, num_samples: int) -> PackedBatch:
        """The same batch of a step that has its first samples alone: the others get weight 0."""
        is_first = self.positions < self.step.first + num_samples
        return replace(self, weights=self.weights * is_first, step=replace(self.step, num_samples=num_samples))


def draw_packed(recipe: TrainRecipe, batch: PackedMicroBatch, texts: TextInfo | None) -> PackedBatch:
    """Draw noise, times and dropped conditions for a packed micro-batch. texts: about the captions, None without them.

    It runs in the loader's threads, so that drawing noise never keeps a GPU waiting.
    """
    parts = batch.parts
    draws = [draw_sample_numbers(recipe, part) for part in parts]
    condition: Tensor | PackedText
    if recipe.model.text_dim is not None:
        assert texts is not None
        captions = [
            caption
            for part, drawn in zip(parts, draws, strict=True)
            for caption in _captions(part, drawn.drop_condition, texts)
        ]
        condition = PackedText(torch.cat(captions), tuple(map(len, captions)))
    else:
        assert isinstance(recipe.model, ImageModelConfig)
        assert recipe.model.num_classes is not None
        dropped = torch.cat([drawn.drop_condition for drawn in draws])
        condition = torch.where(dropped, recipe.model.num_classes, torch.cat([part.condition for part in parts]))
    seeds = [drawn.dropout_seeds for drawn in draws if drawn.dropout_seeds is not None]
    return PackedBatch(
        tuple(part.latents for part in parts),
        tuple(drawn.eps for drawn in draws),
        tuple(drawn.t for drawn in draws),
        condition,
        torch.cat([drawn.start for drawn in draws]) if isinstance(recipe.model, VideoModelConfig) else None,
        torch.cat(seeds) if seeds else None,
        torch.cat([part.weights for part in parts]),
        torch.cat([part.positions for part in parts]),
        tuple(sample for part in parts for sample in part.bad),
        batch.step,
    )


def _captions(batch: MicroBatch, dropped: Tensor, texts: TextInfo) -> list[Tensor]:
    """Return the embeddings (n dim) float16 of each caption, of the empty one where it is dropped."""
    assert batch.text is not None
    assert batch.text_lengths is not None
    null, lengths = null_embedding(texts).to(batch.text.dtype), batch.text_lengths.tolist()
    rows = zip(batch.text, lengths, dropped.tolist(), strict=True)
    return [null if is_dropped else text[:length] for text, length, is_dropped in rows]


def share_of_packed_loss(
    objective: Objective, normalization: Normalization, device: torch.device, model: nn.Module, batch: PackedBatch
) -> Tensor:
    """A packed micro-batch's share of the mean loss over the samples of its step, a scalar in fp32."""
    batch = batch.to(device)
    x0 = [normalize(part, normalization) for part in batch.x0]
    noisy = [interpolate(objective, *parts) for parts in zip(x0, batch.eps, batch.t, strict=True)]
    options = {} if batch.start is None else {"start": batch.start}
    t = torch.cat([part.flatten() for part in batch.t])
    predictions = model(noisy, t, batch.condition, **options, dropout_seeds=batch.dropout_seeds)
    losses = [prediction_loss(objective, *parts) for parts in zip(predictions, x0, batch.eps, batch.t, strict=True)]
    return (torch.cat(losses) * batch.weights).sum() / batch.step.num_samples
