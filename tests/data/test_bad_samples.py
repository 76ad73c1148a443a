from __future__ import annotations

import json
from pathlib import Path

import pytest

from pomscale.base.errors import InputError, PomscaleError
from pomscale.data.bad_samples import BadSample, BadSampleList


def bad(record: int, dataset: str = "d", location: str = "d") -> BadSample:
    return BadSample(dataset, location, record, f"c/{record}", f"{location}: record {record} is gone")


def test_each_sample_is_counted_and_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    listed = BadSampleList(limit=10, known=[("d", 3)], path=path)
    listed.add(64, [bad(3), bad(1), bad(1)])
    listed.add(96, [bad(1, location="moved"), bad(1, "e")])
    assert len(listed) == 3
    assert listed.known == [("d", 1), ("d", 3), ("e", 1)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["samples"], line["dataset"], line["record"]) for line in lines] == [(64, "d", 1), (96, "e", 1)]
    assert lines[0]["key"] == "c/1"
    assert lines[0]["reason"] == "d: record 1 is gone"


def test_what_the_file_lists_is_counted_and_not_listed_again(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    BadSampleList(limit=10, path=path).add(64, [bad(1), bad(2)])
    path.write_bytes(path.read_bytes()[:-20])  # a kill has cut off the line of record 2
    listed = BadSampleList(limit=10, path=path)
    assert len(listed) == 0
    listed.add(64, [bad(1), bad(2), bad(3)])
    assert len(listed) == 3
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["record"] for line in whole] == [1, 2, 3]


def test_too_many_end_the_run(tmp_path: Path) -> None:
    listed = BadSampleList(limit=2, known=[("d", 0)], path=tmp_path / "bad.jsonl")
    listed.add(0, [bad(0), bad(1)])
    with pytest.raises(PomscaleError, match=r"3 samples .* data\.max_bad_samples 2.*record 7 is gone") as caught:
        listed.add(32, [bad(7)])
    assert not isinstance(caught.value, InputError)
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 2  # the last one is listed as well


def test_a_list_that_cannot_be_written_costs_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = BadSampleList(limit=2, path=tmp_path)
    listed.add(0, [bad(0)])
    assert len(listed) == 1
    assert "could not be written" in capsys.readouterr().err
