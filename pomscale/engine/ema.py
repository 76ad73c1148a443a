"""Exponential moving average of sharded weights: each rank averages the shards it holds, without communication."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pomscale.config.schema import EmaConfig


def ema_weight(config: EmaConfig, samples: int, batch: int) -> float:
    """How much of the new weights enters at a step that ends at `samples` (EDM2, appendix C: half-life in samples)."""
    halflife = float(config.halflife_samples)
    if config.rampup_ratio is not None:
        halflife = min(halflife, samples * config.rampup_ratio)
    return 1 - 0.5 ** (batch / halflife)


class Ema:
    """fp32 averages beside (sharded) parameters, by name, sharded as they are."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}
        self._parameters = list(parameters.values())

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """average += weight (parameter - average)."""
        parameters = [_local(p) for p in self._parameters]
        torch._foreach_lerp_([_local(a) for a in self.averages.values()], parameters, weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the parameters hold the averages. Costs memory for one more parameter, not for a model."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self._parameters, self.averages.values(), strict=True):
            held, averaged = _local(parameter), _local(average)
            kept = held.clone()
            held.copy_(averaged)
            averaged.copy_(kept)


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard. detach first: to_local() of a parameter would be part of the autograd graph."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
