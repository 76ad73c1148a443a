"""Sums that are kept of the features of a part of the pictures, and how parts are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pomscale.evaluation.generated.metric_choice import Want
from pomscale.metrics.inception_score import InceptionScore
from pomscale.metrics.moments import Float64, Moments

Arrays: TypeAlias = dict[str, npt.NDArray[np.generic]]


@dataclass
class Scores:
    """Sum and number of CLIP scores."""

    count: int = 0
    total: float = 0.0

    def add(self, scores: Float64) -> None:
        """Add the scores of pictures (b,)."""
        self.count += len(scores)
        self.total += float(scores.sum())


Sum: TypeAlias = Moments | InceptionScore | Scores


def pack(sums: Mapping[Want, Sum]) -> Arrays:
    """Return sums as named arrays. The lower triangle stands for a symmetric matrix: half of the bytes of a part."""
    arrays: Arrays = {}
    for want, one in sums.items():
        if isinstance(one, Moments):
            fields = {"count": np.int64(one.count), "total": one.total, "outer": _lower(one.outer)}
        elif isinstance(one, InceptionScore):
            fields = {"count": one.count, "total": one.total, "negentropy": one.negentropy}
        else:
            fields = {"count": np.int64(one.count), "total": np.float64(one.total)}
        arrays |= {f"{want.key}.{field}": np.asarray(value) for field, value in fields.items()}
    return arrays


def unpack(arrays: Mapping[str, npt.NDArray[np.generic]], wants: Sequence[Want]) -> dict[Want, Sum]:
    """Return the sums that `pack` was given."""
    sums: dict[Want, Sum] = {}
    for want in wants:
        start = f"{want.key}."
        fields = {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}
        if not fields:  # all features are kept, or no picture of the part could be read
            continue
        if want.kept == "moments":
            total = np.asarray(fields["total"], np.float64)
            sums[want] = Moments(int(fields["count"]), total, _symmetric(np.asarray(fields["outer"]), len(total)))
        elif want.kept == "splits":
            sums[want] = InceptionScore(
                np.asarray(fields["count"], np.int64), np.asarray(fields["total"]), np.asarray(fields["negentropy"])
            )
        else:
            sums[want] = Scores(int(fields["count"]), float(fields["total"]))
    return sums


def merge(into: dict[Want, Sum], other: Mapping[Want, Sum]) -> None:
    """Add the sums of another part. Parts are added in their order, since sums of floats depend on it."""
    for want, one in other.items():
        mine = into.setdefault(want, one)
        if mine is one:
            continue
        if isinstance(mine, Scores) and isinstance(one, Scores):
            mine.count, mine.total = mine.count + one.count, mine.total + one.total
        else:
            mine.merge(one)  # type: ignore[union-attr, arg-type]


def _lower(matrix: Float64) -> Float64:
    return np.concatenate([row[: number + 1] for number, row in enumerate(matrix)])


def _symmetric(lower: Float64, dim: int) -> Float64:
    matrix = np.zeros((dim, dim))
    begin = 0
    for number in range(dim):
        matrix[number, : number + 1] = matrix[: number + 1, number] = lower[begin : begin + number + 1]
        begin += number + 1
    return matrix
