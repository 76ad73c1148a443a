"""Precision, recall, density and coverage against their definitions in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from pomscale.metrics import blocks
from pomscale.metrics.neighbours import NeighbourMetrics, neighbour_metrics
from support.outside_metrics import pooled_features

GENERATED, REAL = pooled_features(211, 16, seed=1, shift=0.6), pooled_features(173, 16, seed=2)


def naive(
    generated: npt.NDArray[np.floating], real: npt.NDArray[np.floating], k: int, density_k: int
) -> NeighbourMetrics:
    x, y = generated.astype(np.float64), real.astype(np.float64)

    def distances(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def radii(a: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.float64]:
        return np.sort(distances(a, a), axis=1)[:, k]  # place 0 is the sample itself

    between = distances(x, y)
    within = between < radii(y, density_k)
    return NeighbourMetrics(
        precision=float((between <= radii(y, k)).any(1).mean()),
        recall=float((between <= radii(x, k)[:, None]).any(0).mean()),
        density=float(within.sum() / (density_k * len(x))),
        coverage=float(within.any(0).mean()),
    )


@pytest.fixture(params=[2048, 16, 173])
def rows_of_a_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", request.param)
    return request.param


@pytest.mark.usefixtures("rows_of_a_block")
@pytest.mark.parametrize(("k", "density_k"), [(3, 5), (1, 1), (20, 2)])
def test_all_four_equal_their_definitions(k: int, density_k: int) -> None:
    expected = naive(GENERATED, REAL, k, density_k)
    assert neighbour_metrics(GENERATED, REAL, k, density_k) == expected
    assert all(0.05 < value < 0.999 for value in (expected.precision, expected.coverage))
    parts = [GENERATED[:100], GENERATED[100:]], [REAL[:40], REAL[40:]]
    assert neighbour_metrics(*parts, k, density_k) == expected


def test_each_pair_of_metrics_is_had_alone() -> None:
    both = neighbour_metrics(GENERATED, REAL)
    alone = neighbour_metrics(GENERATED, REAL, density_k=None), neighbour_metrics(GENERATED, REAL, manifold_k=None)
    assert alone[0] == NeighbourMetrics(both.precision, both.recall, None, None)
    assert alone[1] == NeighbourMetrics(None, None, both.density, both.coverage)


@pytest.mark.usefixtures("rows_of_a_block")
@pytest.mark.parametrize("offset", [0, 1000])
def test_a_set_against_itself_has_every_ball_filled_exactly(offset: float) -> None:
    """Each k-th neighbour lies on the edge of a ball: rounding must not put it on either side at random."""
    features = (REAL + offset).astype(np.float32)
    assert neighbour_metrics(features, features) == NeighbourMetrics(1, 1, 1, 1)


def test_a_far_origin_changes_nothing() -> None:
    """Without centring, float32 cannot tell neighbours that lie far from the origin."""
    x, y = (2.0 ** np.ceil(features) + 4096 for features in (GENERATED, REAL))
    assert neighbour_metrics(x, y) == neighbour_metrics(x - 4096, y - 4096)


def test_equal_vectors_are_at_distance_zero() -> None:
    """Balls around samples that are there k + 1 times have radius 0: closed ones hold the sample, open ones nothing."""
    real = REAL[:30].repeat(6, axis=0)
    found = neighbour_metrics(REAL[:30], real)
    assert (found.precision, found.density, found.coverage) == (1, 0, 0)
    one_picture = REAL[:1].repeat(50, axis=0)
    assert neighbour_metrics(one_picture, REAL[1:]).recall == 0


def test_every_part_of_the_real_set_is_looked_at() -> None:
    """Generated samples that copy one half of the data have full precision, and recall of that half alone."""
    halves = REAL[:80], REAL[80:160] + 100
    found = neighbour_metrics(halves[1], np.concatenate(halves))
    assert (found.precision, found.recall, found.coverage) == (1, 0.5, 0.5)


@pytest.mark.parametrize(("generated", "real"), [(REAL[:5], GENERATED), (GENERATED, REAL[:5])])
def test_too_few_samples_are_refused(generated: blocks.Features, real: blocks.Features) -> None:
    with pytest.raises(ValueError, match="there are 5 samples, and at least 6 are needed"):
        neighbour_metrics(generated, real)


def test_wrong_numbers_of_neighbours_and_features_are_refused() -> None:
    with pytest.raises(ValueError, match="are 0 and 5"):
        neighbour_metrics(GENERATED, REAL, manifold_k=0)
    with pytest.raises(ValueError, match="are None and None"):
        neighbour_metrics(GENERATED, REAL, None, None)
    with pytest.raises(ValueError, match="generated: the features of sample 0 are not finite"):
        neighbour_metrics(GENERATED * np.float32(np.nan), REAL)
