"""The inception score against its definition."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from pomscale.metrics.inception_score import InceptionScore, assign_splits
from support.outside_metrics import class_logits


def naive(logits: npt.NDArray[np.floating], splits: npt.NDArray[np.int64]) -> tuple[float, float]:
    x = np.exp(logits.astype(np.float64))
    p = x / x.sum(1, keepdims=True)
    scores = []
    for split in range(splits.max() + 1):
        mine = p[splits == split]
        divergences = [(row * (np.log(row) - np.log(mine.mean(0)))).sum() for row in mine]
        scores.append(np.exp(np.mean(divergences)))
    return float(np.mean(scores)), float(np.std(scores))


@pytest.mark.parametrize(("num_samples", "num_splits"), [(10, 3), (11, 10), (1003, 10), (7, 7), (5, 1)])
def test_splits_have_the_bounds_of_torch_fidelity(num_samples: int, num_splits: int) -> None:
    splits = assign_splits(num_samples, num_splits, shuffle_seed=None)
    for split in range(num_splits):
        begin, end = split * num_samples // num_splits, (split + 1) * num_samples // num_splits
        assert (splits[begin:end] == split).all()
        assert (splits == split).sum() == end - begin


def test_shuffled_samples_are_those_that_torch_fidelity_puts_there() -> None:
    order = np.random.RandomState(2020).permutation(103)
    splits = assign_splits(103)
    assert (splits[order] == assign_splits(103, shuffle_seed=None)).all()


@pytest.mark.parametrize("seed", [None, 2020])
def test_scores_equal_the_definition_whatever_the_batches_and_parts(seed: int | None) -> None:
    logits = class_logits(157, 7, seed=3)
    splits = assign_splits(157, 4, seed)
    parts = [InceptionScore.empty(7, 4) for _ in range(2)]
    for part, bounds in zip(parts, ((0, 60), (60, 157)), strict=True):
        for begin in range(*bounds, 13):
            rows = slice(begin, min(begin + 13, bounds[1]))
            part.add(logits[rows], splits[rows])
    parts[0].merge(parts[1])
    assert parts[0].score() == pytest.approx(naive(logits, splits), rel=1e-12)


def test_certain_and_even_samples_score_as_many_as_there_are_classes() -> None:
    """Probabilities of 0 in float64 are no trouble."""
    logits = 1e4 * np.eye(6)
    score = InceptionScore.empty(6, 1)
    score.add(logits, np.zeros(6, np.int64))
    assert score.score() == (pytest.approx(6), 0)
    one = InceptionScore.empty(6, 1)
    one.add(logits[:1].repeat(4, 0), np.zeros(4, np.int64))
    assert one.score() == (pytest.approx(1), 0)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="9 samples cannot be divided into 10 splits"):
        assign_splits(9)
    score = InceptionScore.empty(3, 2)
    with pytest.raises(ValueError, match="do not fit 2 samples of 3 classes"):
        score.add(np.zeros((2, 4)), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="not finite"):
        score.add(np.full((2, 3), np.nan), np.zeros(2, np.int64))
    score.add(np.zeros((2, 3)), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="split 1 of 2 has no samples"):
        score.score()
    with pytest.raises(ValueError, match="do not fit"):
        score.merge(InceptionScore.empty(3, 4))
