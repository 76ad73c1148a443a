"""From the micro-batches of the loader to the loss of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pomscale.config.schema import TrainRecipe
from pomscale.data.bad_samples import BadSample
from pomscale.data.loader import Loader, MicroBatch
from pomscale.data.normalize import normalize
from pomscale.data.schema import Normalization
from pomscale.diffusion.draws import draw
from pomscale.diffusion.loss import per_sample_loss
from pomscale.diffusion.objectives import Objective


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """A micro-batch with everything random drawn. Shapes: x0, eps (b, c, h, w); t, condition, weights (b,).

    `x0` is as the loader gives it: not normalised, mostly float16. `bad`: the samples that could not be read; their
    weight is 0.
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    condition: Tensor
    weights: Tensor
    bad: tuple[BadSample, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> TrainBatch:
        return TrainBatch(
            function(self.x0),
            function(self.eps),
            function(self.t),
            function(self.condition),
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


def draw_batch(recipe: TrainRecipe, batch: MicroBatch) -> TrainBatch:
    """Runs in the loader's threads, so that drawing noise never keeps a GPU waiting."""
    diffusion = recipe.diffusion
    draws = draw(
        recipe.seed, batch.positions.tolist(), tuple(batch.latents.shape[1:]), diffusion.time, diffusion.class_dropout
    )
    condition = torch.where(draws.drop_condition, recipe.model.num_classes, batch.condition)
    return TrainBatch(batch.latents, draws.eps, draws.t, condition, batch.weights, batch.bad)


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
    losses = per_sample_loss(objective, model, x0, batch.eps, batch.t, batch.condition)
    return (losses * batch.weights).sum() / global_batch
