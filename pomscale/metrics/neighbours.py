"""Precision, recall, density and coverage, from distances to nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pomscale.metrics.blocks import Features, Rows, read_pair

# Squared distances below this share of |x|^2 + |y|^2 are rounding of float64: such vectors are equal.
_ROUNDING = 1e-13


@dataclass(frozen=True)
class NeighbourMetrics:
    """Shares of samples and densities; None is what was not asked for."""

    precision: float | None
    recall: float | None
    density: float | None
    coverage: float | None


def neighbour_metrics(
    generated: Features, real: Features, manifold_k: int | None = 3, density_k: int | None = 5
) -> NeighbourMetrics:
    """Return precision and recall, and density and coverage, from one pass over all distances.

    - Precision (improved, Kynkaanniemi et al. 2019): share of generated samples within the ball of a real one, which
      reaches to its k-th nearest other real sample. Recall: the same with the sets exchanged. Balls are closed, as in
      the paper, in torch-fidelity and in ADM's evaluator (which measures in float16).
    - Density (Naeem et al. 2020): mean number of real balls around a generated sample, divided by k; it may be more
      than 1. Coverage: share of real samples with a generated one in their ball. Balls are open, as in prdc.

    Distances are taken in float64 of vectors whose origin is the mean of the first block, and compared in float32, so
    that equal distances are equal whatever the order of sums. All is done in blocks: memory does not grow with n but
    for a few numbers per sample. Time is that of (n + m)^2 d + 2 n m d multiplications.

    Args:
        generated: Features (n, d).
        real: Features (m, d).
        manifold_k: k of precision and recall, or None.
        density_k: k of density and coverage, or None.

    Raises:
        ValueError: Features do not fit or are not finite, or k is not below n and m.
    """
    ks = tuple(k for k in (manifold_k, density_k) if k is not None)
    if not ks or min(ks) < 1:
        raise ValueError(f"numbers of neighbours must be 1 or more, and are {manifold_k} and {density_k}")
    sets = read_pair(generated, real, at_least=max(ks) + 1)
    origin = next(sets[1].blocks())[1].mean(0)
    real_radii = _radii(sets[1], ks, origin)
    balls = _Balls(
        around_real=real_radii[:, 0] if manifold_k is not None else None,
        around_generated=_radii(sets[0], (manifold_k,), origin)[:, 0] if manifold_k is not None else None,
        open_around_real=real_radii[:, -1] if density_k is not None else None,
    )
    return balls.count(*sets, origin, density_k)


@dataclass(frozen=True)
class _Balls:
    """Squared radii (n,) or (m,) of the balls that samples are looked for in, float32."""

    around_real: Tensor | None
    around_generated: Tensor | None
    open_around_real: Tensor | None

    def count(self, generated: Rows, real: Rows, origin: Tensor, density_k: int | None) -> NeighbourMetrics:
        """Compare all distances between the sets with the radii."""
        precise, recalled = torch.zeros(generated.count, dtype=torch.bool), torch.zeros(real.count, dtype=torch.bool)
        covered, num_within = torch.zeros(real.count, dtype=torch.bool), 0
        for mine, x in generated.blocks():
            for theirs, y in real.blocks():
                distances = _squared_distances(x - origin, y - origin)
                if self.around_real is not None and self.around_generated is not None:
                    precise[mine] |= (distances <= self.around_real[theirs]).any(1)
                    recalled[theirs] |= (distances <= self.around_generated[mine, None]).any(0)
                if self.open_around_real is not None:
                    within = distances < self.open_around_real[theirs]
                    covered[theirs] |= within.any(0)
                    num_within += int(within.sum())
        has_manifold = self.around_real is not None
        return NeighbourMetrics(
            precision=_share(precise) if has_manifold else None,
            recall=_share(recalled) if has_manifold else None,
            density=num_within / (density_k * generated.count) if density_k is not None else None,
            coverage=_share(covered) if density_k is not None else None,
        )


def _share(flags: Tensor) -> float:
    return int(flags.sum()) / len(flags)


def _radii(rows: Rows, ks: tuple[int, ...], origin: Tensor) -> Tensor:
    """Return the squared distances (n, len(ks)) to the k-th nearest other vector, float32.

    Each pair of blocks is computed once, and serves the rows of both.
    """
    nearest = torch.full((rows.count, max(ks)), torch.inf)
    for mine, x in rows.blocks():
        for others, y in rows.blocks(mine.start):
            distances = _squared_distances(x - origin, y - origin)
            if others == mine:
                distances.fill_diagonal_(torch.inf)
            else:
                _keep_nearest(nearest[others], distances.T)
            _keep_nearest(nearest[mine], distances)
    return nearest[:, [k - 1 for k in ks]]


def _keep_nearest(nearest: Tensor, distances: Tensor) -> None:
    """Merge distances (b, a) into the k smallest so far (b, k), in place, in ascending order."""
    k = nearest.shape[1]
    smallest = distances.topk(min(k, distances.shape[1]), dim=1, largest=False).values
    nearest.copy_(torch.cat([nearest, smallest], 1).topk(k, dim=1, largest=False).values)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return |x_i - y_j|^2 (a, b) as float32, and 0 where it is within the rounding of float64."""
    sizes = (x * x).sum(1)[:, None] + (y * y).sum(1)
    distances = torch.addmm(sizes, x, y.T, alpha=-2)
    return distances.masked_fill_(distances < sizes * _ROUNDING, 0).float()
