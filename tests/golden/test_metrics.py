"""Metrics of random features as torch-fidelity, pytorch-fid, prdc and CMMD's reference code give them.

`support/outside_metrics.py` has the features' recipe, and says how the file was made.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pomscale.metrics.frechet import frechet_distance
from pomscale.metrics.inception_score import InceptionScore, assign_splits
from pomscale.metrics.kernels import Subsets, cmmd, kid
from pomscale.metrics.moments import Moments
from pomscale.metrics.neighbours import neighbour_metrics
from support.outside_metrics import GOLDEN, class_logits, few_sets, small_sets, wide_sets

OUTSIDE: dict[str, Any] = json.loads(GOLDEN.read_text())
Pair = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


@pytest.mark.parametrize(
    ("name", "sets"),
    [("small", small_sets), ("few", few_sets), pytest.param("wide", wide_sets, marks=pytest.mark.slow)],
)
def test_frechet_distances(name: str, sets: Callable[[], Pair]) -> None:
    moments = []
    for features in sets():
        moments.append(Moments.empty(features.shape[1]))
        for begin in range(0, len(features), 500):
            moments[-1].add(features[begin : begin + 500])
    value = frechet_distance(*moments).value
    assert value == pytest.approx(OUTSIDE["torch-fidelity"]["fid"][name], rel=1e-5)  # its means are in float32
    assert value == pytest.approx(OUTSIDE["pytorch-fid"]["fid"][name], rel=1e-6)


@pytest.mark.parametrize(("name", "seed"), [("inception_score", 2020), ("inception_score in order", None)])
def test_inception_scores(name: str, seed: int | None) -> None:
    logits = class_logits(1003, 10, seed=7)
    score = InceptionScore.empty(10)
    score.add(logits, assign_splits(1003, shuffle_seed=seed))
    expected = OUTSIDE["torch-fidelity"][name]
    assert score.score() == pytest.approx((expected["inception_score_mean"], expected["inception_score_std"]), rel=1e-9)


def test_kid_over_subsets() -> None:
    expected = OUTSIDE["torch-fidelity"]["kid"]
    assert kid(*small_sets(), Subsets()) == pytest.approx(
        (expected["kernel_inception_distance_mean"], expected["kernel_inception_distance_std"]), rel=1e-5
    )


def test_precision_recall_density_and_coverage() -> None:
    found = neighbour_metrics(*small_sets())
    expected = OUTSIDE["torch-fidelity"]["precision_recall"] | {
        name: OUTSIDE["prdc"][name] for name in ("density", "coverage")
    }
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-6), name


def test_cmmd() -> None:
    # The reference works in float32, where kernels between 0.98 and 1 leave four digits of their differences.
    assert cmmd(*small_sets()) == pytest.approx(OUTSIDE["cmmd"], rel=1e-3)
