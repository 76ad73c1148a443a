"""The rivals of the decoding benchmark give what pomscale gives, or there is no figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from pomscale.base.errors import PomscaleError
from pomscale.benchmarks import decode
from pomscale.benchmarks.report import BenchReport


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_HEIGHT": 100, "_WIDTH": 160, "_TARGET": (80, 60, 96)}.items():
        monkeypatch.setattr(decode, name, value)


def test_rivals_agree(tmp_path: Path) -> None:
    report = BenchReport("encode")
    decode.bench_decode(report, tmp_path, num_clips=2, num_turns=1)
    assert len(report.rows) == 7
    assert len(report.verdicts) == 3


@pytest.mark.parametrize("rival", ["_seeks", "_plain_loop"])
def test_there_is_no_figure_if_they_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rival: str) -> None:
    found = getattr(decode, rival)

    def late(*arguments: object) -> object:
        clips = found(*arguments)
        return np.roll(clips, 1, 0) if isinstance(clips, np.ndarray) else [np.roll(clip, 1, 0) for clip in clips]

    monkeypatch.setattr(decode, rival, late)
    with pytest.raises(PomscaleError, match="no figure"):
        decode.bench_decode(BenchReport("encode"), tmp_path, num_clips=1, num_turns=1)
