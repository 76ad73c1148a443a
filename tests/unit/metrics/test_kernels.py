"""KID, CMMD and CLIP score against their definitions in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pomscale.metrics import blocks
from pomscale.metrics.kernels import Subsets, clip_score, cmmd, kid
from support.outside_metrics import pooled_features

Float64 = npt.NDArray[np.float64]
GENERATED, REAL = pooled_features(107, 12, seed=1, shift=0.3), pooled_features(83, 12, seed=2)


def naive_kid(x: npt.NDArray[np.floating], y: npt.NDArray[np.floating]) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    n, m, d = len(x), len(y), x.shape[1]
    k_xx, k_yy, k_xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (k_xx.sum() - np.trace(k_xx)) / (n * (n - 1)) + (k_yy.sum() - np.trace(k_yy)) / (m * (m - 1))
    return within - 2 * k_xy.mean()


@pytest.fixture(params=[2048, 16, 83])
def rows_of_a_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", request.param)
    return request.param


@pytest.mark.usefixtures("rows_of_a_block")
def test_kid_of_all_samples_is_the_unbiased_estimate() -> None:
    value, deviation = kid(GENERATED, REAL)
    assert value == pytest.approx(naive_kid(GENERATED, REAL), rel=1e-11)
    assert deviation == 0
    assert kid(REAL, REAL)[0] == pytest.approx(naive_kid(REAL, REAL), rel=1e-9)


def test_kid_of_subsets_is_the_mean_over_draws_from_either_set_in_turn() -> None:
    random = np.random.RandomState(5)
    draws = [(random.choice(107, 31, replace=False), random.choice(83, 31, replace=False)) for _ in range(6)]
    values = [naive_kid(GENERATED[ours], REAL[theirs]) for ours, theirs in draws]
    found = kid(GENERATED, REAL, Subsets(6, 31, seed=5))
    assert found == pytest.approx((np.mean(values), np.std(values)), rel=1e-10)


def test_parts_in_memory_maps_are_one_set(tmp_path: Path) -> None:
    parts = []
    for index, rows in enumerate((slice(0, 50), slice(50, 50), slice(50, 107))):
        np.save(tmp_path / f"{index}.npy", GENERATED[rows])
        parts.append(np.load(tmp_path / f"{index}.npy", mmap_mode="r"))
    assert kid(parts, [REAL[:1], REAL[1:]]) == kid(GENERATED, REAL)
    assert kid(parts, REAL, Subsets(3, 40)) == kid(GENERATED, REAL, Subsets(3, 40))


@pytest.mark.usefixtures("rows_of_a_block")
def test_cmmd_is_the_biased_estimate_of_normalised_embeddings() -> None:
    x, y = ((a / np.linalg.norm(a, axis=1, keepdims=True)).astype(np.float64) for a in (GENERATED, REAL))

    def mean_kernel(a: Float64, b: Float64) -> float:
        return float(np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 10**2)).mean())

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(GENERATED, REAL) == pytest.approx(expected, rel=1e-7)
    assert cmmd(7 * GENERATED, REAL) == pytest.approx(expected, rel=1e-7)
    assert cmmd(REAL, REAL) == pytest.approx(0, abs=1e-9)


def test_clip_score_is_the_cosine_of_each_pair_and_never_negative() -> None:
    images, texts = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]), np.array([[0.0, 9.0], [-1.0, 0.1], [0.0, 1.0]])
    assert clip_score(images.astype(np.float32), texts) == pytest.approx([80, 0, 100])


def _with(value: float) -> npt.NDArray[np.float32]:
    changed = GENERATED.copy()
    changed[40, 3] = value
    return changed


@pytest.mark.parametrize(
    ("generated", "real", "message"),
    [
        (GENERATED[:, :5], REAL, "generated features have width 5, real ones 12"),
        ([GENERATED, GENERATED[:, :5]], REAL, r"generated: parts have features of widths \[5, 12\]"),
        (_with(np.nan), REAL, "generated: the features of sample 40 are not finite"),
        (GENERATED, _with(np.inf), "real: the features of sample 40 are not finite"),
        ([REAL[:9], _with(np.nan)], REAL, "generated: the features of sample 49 are not finite"),
        (GENERATED[:1], REAL, "generated: there are 1 samples, and at least 2 are needed"),
        (GENERATED[0], REAL, r"generated: features are float32 \(12,\)"),
        (GENERATED.astype(np.int32), REAL, "generated: features are int32"),
        ([], REAL, "generated: there are no features"),
    ],
)
def test_bad_features_are_refused(generated: blocks.Features, real: blocks.Features, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kid(generated, real)


def test_subsets_larger_than_a_set_or_empty_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="real: there are 83 samples, and at least 90 are needed"):
        kid(GENERATED, REAL, Subsets(size=90))
    with pytest.raises(ValueError, match="not 100 of 1"):
        kid(GENERATED, REAL, Subsets(size=1))


def test_embeddings_without_direction_or_partner_are_refused() -> None:
    with pytest.raises(ValueError, match="is 0 and has no direction"):
        cmmd(np.zeros((2, 3)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="do not fit"):
        clip_score(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="not finite"):
        clip_score(np.full((2, 3), np.nan), np.ones((2, 3)))
