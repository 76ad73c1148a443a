"""Retention: no wanted checkpoint is ever deleted, in any order of saves and of metrics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomscale.base.errors import PomscaleError
from pomscale.checkpoint.retention import expendable, read_judged, write_judged
from pomscale.config.engine import CheckpointConfig

CONFIGS = st.builds(
    CheckpointConfig,
    every_samples=st.just(1),
    keep_last=st.integers(1, 4),
    keep_every_samples=st.none() | st.integers(1, 60),
    keep_best=st.integers(0, 3),
)
SAMPLES = st.sets(st.integers(1, 300), max_size=40).map(sorted)
VALUES = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 1.0])


@given(SAMPLES, st.dictionaries(st.integers(1, 300), VALUES), CONFIGS)
def test_what_is_kept_is_what_was_asked_for(
    complete: list[int], judged: dict[int, float], config: CheckpointConfig
) -> None:
    gone = expendable(complete, judged, config)
    kept = [samples for samples in complete if samples not in gone]
    assert [samples for samples in complete if samples in gone] == gone
    assert kept[-config.keep_last :] == complete[-config.keep_last :]
    finite = sorted(judged[n] for n in complete if math.isfinite(judged.get(n, math.nan)))
    assert (
        sorted(judged[n] for n in kept if math.isfinite(judged.get(n, math.nan)))[: config.keep_best]
        == (finite[: config.keep_best])
    )
    for samples in gone:
        every = config.keep_every_samples
        assert every is None or samples % every != 0
    assert len(kept) <= config.keep_last + config.keep_best + sum(
        config.keep_every_samples is not None and b // config.keep_every_samples > a // config.keep_every_samples
        for a, b in zip([0, *complete], complete, strict=False)
    )
    assert expendable(kept, judged, config) == []


@given(SAMPLES, st.integers(1, 4), st.integers(1, 60))
def test_one_by_one_the_first_at_or_after_each_multiple_stays_for_good(
    saved: list[int], keep_last: int, every: int
) -> None:
    """Batches seldom end on a multiple; and what a deletion leaves must not change what the next one keeps."""
    config = CheckpointConfig(every_samples=1, keep_last=keep_last, keep_every_samples=every)
    there: list[int] = []
    for samples in saved:
        there.append(samples)
        gone = expendable(there, {}, config)
        there = [n for n in there if n not in gone]
    firsts = {next((n for n in saved if n >= multiple), None) for multiple in range(every, 301, every)} - {None}
    assert set(there) == firsts | set(saved[-keep_last:])


def test_the_best_by_value_and_the_newer_of_equals() -> None:
    config = CheckpointConfig(every_samples=10, keep_last=1, keep_best=2)
    judged = {10: 0.5, 20: 0.3, 30: 0.5, 40: math.nan}
    assert expendable([10, 20, 30, 40, 50], judged, config) == [10, 40]


def test_values_survive_restarts_and_a_file_that_cannot_be_read_deletes_nothing(tmp_path: Path) -> None:
    assert read_judged(tmp_path) == {}
    write_judged(tmp_path / "none" / "yet", {10: 0.5}, known=set())
    assert read_judged(tmp_path / "none" / "yet") == {}
    write_judged(tmp_path, {10: 0.5, 20: 0.25, 30: 0.125}, known={20, 30})
    assert read_judged(tmp_path) == {20: 0.25, 30: 0.125}
    (tmp_path / "judged.json").write_text("{")
    with pytest.raises(PomscaleError, match=r"judged\.json cannot be read .* none is deleted"):
        read_judged(tmp_path)
