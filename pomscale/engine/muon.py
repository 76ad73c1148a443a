"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) on matrices whose elements are spread over ranks.

The step of a matrix W (rows, columns) with gradient G and momentum B, as torch.optim.Muon has it:

    B <- mu B + (1 - mu) G
    U  = (1 - mu) G + mu B, with Nesterov's momentum; else B
    O  = orthogonalize(U)
    W <- (1 - lr decay) W - 0.2 lr sqrt(max(rows, columns)) O

The factor of O gives its elements the root mean square that AdamW's steps have, about 0.2 (Liu et al. 2025, "Muon is
Scalable for LLM Training", arXiv 2502.16982, section 2.2; torch's adjust_lr_fn="match_rms_adamw"), so that AdamW's
learning rate and decay serve for both.

Gradients, momenta and weights stay where they are. Matrices are taken in rounds of as many as there are ranks, largest
first: each rank gathers one, in the precision of the arithmetic, orthogonalises it and gives its parts back. So the
work divides over the ranks, and no rank holds more than one whole matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pomscale.config.engine import OptimizerConfig
from pomscale.distributed.flat_shard import local_part
from pomscale.engine.adamw_bf16 import round_to_bf16
from pomscale.engine.matrices import Matrix, MatrixRanks, matrices_of

_A, _B, _C = 3.4445, -4.7750, 2.0315
_SMALLEST_NORM = 1e-7
_RMS_OF_ADAMW = 0.2
_ORTHOGONALIZED = "orthogonalized"  # key of the group of matrices


def orthogonalize(matrix: Tensor, num_steps: int) -> Tensor:
    """Return U V^T of U S V^T = matrix, but for singular values, which become about 1: 0.7 to 1.2.

    Each step maps them by s <- 3.4445 s - 4.775 s^3 + 2.0315 s^5 (quintic Newton-Schulz iteration), which takes
    2 (2 m^2 n + m^3) FLOPs for sides m <= n. The order of all operations is torch.optim.Muon's.

    Args:
        matrix: (rows, columns); is overwritten.
        num_steps: number of steps.

    Returns:
        (rows, columns) in the same dtype.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x.div_(x.norm().clamp(min=_SMALLEST_NORM))
    for _ in range(num_steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.addmm(x, polynomial, x, beta=_A)
    return x.T if is_tall else x


def adjusted(learning_rate: float, rows: int, columns: int) -> float:
    """Return the learning rate of a matrix whose steps are to have the root mean square of AdamW's."""
    return learning_rate * _RMS_OF_ADAMW * math.sqrt(max(rows, columns))


class Muon(torch.optim.Optimizer):
    """Muon on its first group, the matrices; the optimiser of the rest, AdamW, steps all other groups."""

    def __init__(
        self, parameters: Mapping[nn.Parameter, int], rest: torch.optim.Optimizer, config: OptimizerConfig
    ) -> None:
        """Take over the groups of `rest`.

        Args:
            parameters: parameter with matrices, whole or sharded by FSDP2 -> number of matrices that its rows stack.
            rest: optimiser of all other parameters, whose state becomes this one's.
            config: settings.
        """
        group = {
            "params": list(parameters),
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            _ORTHOGONALIZED: True,
        }
        super().__init__([group, *rest.param_groups], {})
        self._rest = rest
        self._rest.state = self.state
        self._momentum, self._nesterov = config.muon.momentum, config.muon.nesterov
        self._dtype = torch.float32 if config.muon.precision == "fp32" else torch.bfloat16
        self._orthogonalize: Callable[[Tensor], Tensor] = partial(orthogonalize, num_steps=config.muon.ns_steps)
        self.place(
            (matrix for parameter, number in parameters.items() for matrix in matrices_of(parameter, number)),
            MatrixRanks.of(next(iter(parameters))),
        )

    def place(self, matrices: Iterable[Matrix], ranks: MatrixRanks) -> None:
        """Set where the matrices are, for an engine that steps other tensors than parameters."""
        self._ranks = ranks
        # Matrices of a round are worked on at the same time, so they should be about as large.
        self._matrices = sorted(matrices, key=lambda matrix: matrix.num_elements, reverse=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step the present groups. A collective of all ranks; DeepSpeed steps one group at a time."""
        assert closure is None, "the loss is computed by the engine"
        for group in self.param_groups:
            if _ORTHOGONALIZED in group:
                self._step_matrices(group)
        self._rest.param_groups = [group for group in self.param_groups if _ORTHOGONALIZED not in group]
        if self._rest.param_groups:
            self._rest.step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        stepped = {id(tensor): tensor for tensor in group["params"] if tensor.grad is not None}
        for tensor in stepped.values():
            self.state[tensor]["step"] += 1
        matrices = [matrix for matrix in self._matrices if id(matrix.tensor) in stepped]
        noise = self._noise(matrices[0]) if matrices else None
        for first in range(0, len(matrices), self._ranks.size):
            of_round = matrices[first : first + self._ranks.size]
            for matrix in of_round:
                self._advance_momentum(matrix, noise)
            self._step_round(of_round, group)

    def _step_round(self, matrices: Sequence[Matrix], group: dict[str, Any]) -> None:
        """Step at most as many matrices as there are ranks, so that each rank orthogonalises at most one."""
        ranks = self._ranks
        by_copy = [matrices[first : first + ranks.num_shards] for first in range(0, len(matrices), ranks.num_shards)]
        own = None
        if ranks.copy < len(by_copy):
            own = ranks.on_whole(by_copy[ranks.copy], self._directions(by_copy[ranks.copy]), self._orthogonalize)
        for copy, of_copy in enumerate(by_copy):
            counts = [matrix.counts[ranks.shard] for matrix in of_copy]
            results = ranks.from_copy(copy, own, sum(counts), self._dtype)
            for matrix, result in zip(of_copy, results.split(counts), strict=True):
                self._apply(matrix, result, group)

    def _noise(self, first: Matrix) -> torch.Generator:
        """Return the generator of a step's rounding, from which all matrices draw in turn.

        A seed of their own lets ranks round their rows differently: equal rows of noise would add up to large singular
        values. Copies of a shard round alike, and a run that is resumed with the same shards is the same.
        """
        state = self.state[first.tensor]
        seed = int(state["step"].item()) * self._ranks.num_shards + self._ranks.shard
        return torch.Generator(state["momentum_buffer"].device).manual_seed(seed)

    def _advance_momentum(self, matrix: Matrix, noise: torch.Generator | None) -> None:
        state = self.state[matrix.tensor]
        gradient, momentum = self._part(matrix, matrix.tensor.grad), self._part(matrix, state["momentum_buffer"])
        if momentum.dtype == torch.float32:
            momentum.lerp_(gradient, 1 - self._momentum)
        else:
            assert noise is not None
            momentum.copy_(round_to_bf16(momentum.float().lerp_(gradient, 1 - self._momentum), noise))

    def _directions(self, matrices: Sequence[Matrix]) -> Tensor:
        """Return this rank's parts of what is to be orthogonalised, flat, one after the other."""
        counts = [matrix.counts[self._ranks.shard] for matrix in matrices]
        directions = torch.empty(sum(counts), dtype=self._dtype, device=self._ranks.device)
        for matrix, direction in zip(matrices, directions.split(counts), strict=True):
            momentum = self._part(matrix, self.state[matrix.tensor]["momentum_buffer"]).float()
            gradient = self._part(matrix, matrix.tensor.grad)
            direction.copy_(gradient.lerp(momentum, self._momentum) if self._nesterov else momentum)
        return directions

    def _apply(self, matrix: Matrix, result: Tensor, group: dict[str, Any]) -> None:
        value = self._part(matrix, matrix.tensor)
        value.mul_(1 - group["lr"] * group["weight_decay"])
        step = -adjusted(group["lr"], matrix.rows, matrix.columns)
        value.add_(result.to(value.device), alpha=step)

    def _part(self, matrix: Matrix, tensor: Tensor | None) -> Tensor:
        """Return this rank's elements of a matrix in a tensor that is laid out like the one that is stepped; live."""
        assert tensor is not None
        return local_part(tensor).view(-1)[matrix.offset :][: matrix.counts[self._ranks.shard]]
