"""Memory, arithmetic and traffic of the optimiser's state and step, as engine/optimizers.py and engine/muon.py have it.

Newton-Schulz on a matrix of sides m <= n takes 2 (2 m^2 n + m^3) FLOPs for each of `ns_steps` iterations: its Gram
matrix, the square of that, and a product of both. AdamW's step is elementwise and counts as no arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pomscale.config.engine import MuonConfig, OptimizerConfig
from pomscale.plan.shadow.network import Network
from pomscale.plan.shadow.operators import Weight

_FP32, _BF16 = 4, 2

Sides = tuple[int, int]


def moment_bytes(optimizer: OptimizerConfig, network: Network, weights: Sequence[Weight], num_elements: int) -> int:
    """Return the bytes of the state of `num_elements` elements of these weights: two moments, or a matrix's one.

    The elements may be a rank's part of the weights; matrices are taken to have their share of them.
    """
    itemsize = _BF16 if optimizer.moments == "bf16" else _FP32
    if optimizer.name != "muon":
        return 2 * itemsize * num_elements
    stepped = {id(weight) for weight in network.matrices()}
    of_matrices = sum(math.prod(weight.shape) for weight in weights if id(weight) in stepped)
    return round(itemsize * num_elements * (2 - of_matrices / sum(math.prod(weight.shape) for weight in weights)))


def matrix_sides(network: Network) -> list[Sides]:
    """Return (rows, columns) of every matrix of Muon, largest first, as ranks take them."""
    sides = [
        (weight.shape[0] // weight.num_matrices, weight.shape[1])
        for weight in network.matrices()
        for _ in range(weight.num_matrices)
    ]
    return sorted(sides, key=math.prod, reverse=True)


def newton_schulz_flops(rows: int, columns: int, num_steps: int) -> int:
    """Return the FLOPs of making a matrix orthogonal."""
    small, large = sorted((rows, columns))
    return num_steps * 2 * (2 * small**2 * large + small**3)


def step_flops(optimizer: OptimizerConfig, network: Network, num_ranks: int = 1) -> int:
    """Return the FLOPs of the rank that has most to do in a step of the optimiser, the first one of each round."""
    if optimizer.name != "muon":
        return 0
    return sum(newton_schulz_flops(*sides, optimizer.muon.ns_steps) for sides in matrix_sides(network)[::num_ranks])


def step_bytes(muon: MuonConfig, network: Network, num_ranks: int) -> int:
    """Return the bytes that a rank needs for the largest matrix: the parts that it sends, the matrix, its iteration."""
    itemsize = _FP32 if muon.precision == "fp32" else _BF16
    rows, columns = matrix_sides(network)[0]
    # The matrix before the first iteration, before the last one, and after it.
    copies = 3 if num_ranks == 1 else 4
    return itemsize * (copies * rows * columns + 2 * min(rows, columns) ** 2)


def sent_bytes(optimizer: OptimizerConfig, network: Network, num_shards: int, num_copies: int) -> float:
    """Return the bytes that a rank sends in a step: parts of matrices to their owners, back, and to other copies."""
    if optimizer.name != "muon":
        return 0.0
    itemsize = _FP32 if optimizer.muon.precision == "fp32" else _BF16
    whole = itemsize * sum(math.prod(sides) for sides in matrix_sides(network))
    there_and_back = 2 * whole / (num_shards * num_copies) * (num_shards - 1) / num_shards
    return there_and_back + whole / num_shards * (num_copies - 1) / num_copies
