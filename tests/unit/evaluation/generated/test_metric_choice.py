"""Which metrics are measured, of which extractor's features, and why others are not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pomscale.base.errors import InputError
from pomscale.evaluation.generated.metric_choice import (
    METRICS,
    MOST_PAIRED,
    Reference,
    Sides,
    choose,
    owner_of,
    warnings_of,
)
from pomscale.evaluation.generated.statistics_files import Statistics
from pomscale.metrics.moments import Gaussian


def extractor(name: str, **dims: int) -> Any:
    return SimpleNamespace(name=name, identity=f"identity of {name}", dims=dims or {"pooled": 4})


def pictures(count: int = 50_000, captions: bool = False) -> Any:
    return SimpleNamespace(name="pictures", num_pictures=count, has_captions=captions, frames=None)


def statistics(of: str | None = None, features: tuple[str, ...] = ("pooled",)) -> Statistics:
    gaussian = Gaussian(np.zeros(4), np.eye(4))
    return Statistics({name: gaussian for name in features}, of, {}, Path("s.npz"), "hash")  # type: ignore[misc]


INCEPTION = extractor("inception", pooled=4, spatial=5, logits=6)
BOTH = Sides(pictures(), Reference(pictures()))


def chosen(*extractors: Any, sides: Sides = BOTH, asked: tuple[str, ...] | None = None) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(want) for name, want in choose(extractors, sides, asked).wants.items()}


def test_all_that_the_extractors_serve() -> None:
    found = chosen(extractor("dinov2"), extractor("clip"), INCEPTION)
    assert found == {
        "fid": (2, "pooled", "moments"),
        "sfid": (2, "spatial", "moments"),
        "inception_score": (2, "logits", "splits"),
        **{name: (2, "pooled", "features") for name in ("precision", "recall", "density", "coverage", "kid")},
        "fdd": (0, "pooled", "moments"),
        "cmmd": (1, "pooled", "features"),
    }
    assert "clip_score" in chosen(extractor("clip"), sides=Sides(pictures(captions=True), Reference()))


def test_dinov2_alone_serves_neighbours_but_no_fid() -> None:
    found = chosen(extractor("dinov2"))
    assert set(found) == {"fdd", "precision", "recall", "density", "coverage", "kid"}


def test_an_inception_score_of_fewer_pictures_than_splits_is_left_out_unless_it_is_asked_for() -> None:
    sides = Sides(pictures(9), Reference(pictures()))
    choice = choose([INCEPTION], sides, None)
    assert "fid" in choice.wants
    assert "inception_score" not in choice.wants
    assert (
        choice.left_out["inception_score"]
        == "needs a picture for each of its 10 splits, and pictures has 9; see --splits"
    )
    with pytest.raises(InputError, match="--metrics inception_score: needs a picture for each of its 10 splits"):
        choose([INCEPTION], sides, ("inception_score",))
    assert "inception_score" in choose([INCEPTION], sides, None, splits=9).wants


def test_without_a_reference() -> None:
    assert set(chosen(INCEPTION, sides=Sides(pictures(), Reference()))) == {"inception_score"}
    with pytest.raises(InputError, match=r"there is no metric to measure: fid, precision, .*: needs a --reference"):
        chosen(extractor("pixels"), sides=Sides(pictures(), Reference()))
    choice = choose([extractor("pixels")], Sides(pictures(), Reference()), None, writes_statistics=True)
    assert [tuple(want) for want in choice.of_source] == [(0, "pooled", "moments")]


def test_statistics_serve_distances_alone() -> None:
    sides = Sides(pictures(), Reference(None, statistics()))
    assert set(chosen(INCEPTION, sides=sides)) == {"fid", "inception_score"}
    with pytest.raises(InputError, match=r"--metrics kid: needs the pictures of the reference"):
        chosen(INCEPTION, sides=sides, asked=("kid",))
    with pytest.raises(InputError, match=r"--metrics sfid: needs spatial features, and the statistics have pooled"):
        chosen(INCEPTION, sides=sides, asked=("sfid",))


def test_statistics_are_of_one_extractor() -> None:
    several = (INCEPTION, extractor("dinov2"))
    unknown = Sides(pictures(), Reference(None, statistics()))
    with pytest.raises(InputError, match=r"dinov2: no metric takes its features .*fdd: needs statistics of extractor"):
        chosen(*several, sides=unknown)
    with pytest.raises(InputError, match="fdd: needs statistics of extractor dinov2, and those of the reference are"):
        chosen(*several, asked=("fdd",), sides=unknown)
    known = Sides(pictures(), Reference(None, statistics("identity of dinov2")))
    assert set(chosen(*several, sides=known)) == {"fdd", "inception_score"}


def test_statistics_that_tell_no_extractor_are_of_the_first_one_of_their_width() -> None:
    several = (extractor("clip", pooled=4), extractor("dinov2", pooled=3), INCEPTION)
    reference = Reference(pictures(), statistics())
    assert owner_of(statistics(), several) == 2
    found = chosen(*several[::2], sides=Sides(pictures(), reference), asked=("fid", "cmmd"))
    assert found == {"fid": (1, "pooled", "moments"), "cmmd": (0, "pooled", "features")}
    assert owner_of(statistics(), several[:2]) == 0
    assert owner_of(statistics("identity of another"), several) == 0


def test_pictures_beside_statistics_serve_what_statistics_do_not() -> None:
    reference = Reference(pictures(), statistics())
    choice = choose([INCEPTION], Sides(pictures(), reference), None)
    assert {"fid", "precision", "kid"} <= set(choice.wants)
    assert "sfid" not in choice.wants
    assert {want.kept for want in choice.of_reference(reference)} == {"features"}


def test_all_pairs_of_large_sets_are_measured_when_asked_for_alone() -> None:
    sides = Sides(pictures(), Reference(pictures(MOST_PAIRED + 1)))
    assert "kid" not in chosen(INCEPTION, sides=sides)
    assert "kid" in chosen(INCEPTION, sides=sides, asked=("kid",))


def test_what_is_asked_for_and_cannot_be_had() -> None:
    for asked, message in (
        (("fidd",), "'fidd' is none of fid, sfid"),
        (("fdd",), r"--metrics fdd: needs --extractor dinov2:FOLDER"),
        (("inception_score",), "needs logits features, and extractor pixels has pooled"),
    ):
        with pytest.raises(InputError, match=message):
            chosen(extractor("pixels"), asked=asked)
    with pytest.raises(InputError, match=r"precision: needs 4 pictures, and pictures has 3"):
        chosen(INCEPTION, asked=("precision",), sides=Sides(pictures(3), Reference(pictures())))
    with pytest.raises(InputError, match=r"--extractor dinov2: no metric takes its features"):
        chosen(INCEPTION, extractor("dinov2"), asked=("fid",))


def test_few_pictures_are_warned_of_with_the_bias() -> None:
    choice = choose([INCEPTION], BOTH, ("fid", "kid", "precision"))
    assert warnings_of(choice, {"source": 50_000, "reference": 50_000}) == []
    found = warnings_of(choice, {"source": 50_000, "reference": 9_999})
    assert [text.split(";")[0] for text in found] == [
        "fid of 9,999 pictures is biased upwards, by about 1 / number",
        "precision of 9,999 pictures comes out too high, since balls around few pictures are large",
    ]
    assert {name for name, metric in METRICS.items() if metric.good_number and not metric.bias} == set()
