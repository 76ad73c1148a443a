"""Measured quality in `pomscale runs` and `pomscale runs status`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.status.overview import status
from launch.status.runs import summarize
from launch.status.table import as_json, as_table
from pomscale.monitoring.sinks import JsonlSink
from pomscale.runs.evaluation_log import record
from pomscale.runs.metric_names import evaluation_name

FID, KID = evaluation_name("images", "fid"), evaluation_name("images", "kid")
SETTINGS = {"sampler": {"name": "euler", "steps": 50}, "seeds": [0, 999], "reference": {"sha256": "abc"}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").touch()
    sink = JsonlSink(folder, 0)
    sink.log(128, {"train/loss": 1.0})
    sink.close()
    return folder


def test_the_table_has_no_column_for_what_nobody_measured(run: Path) -> None:
    record(run, 64, {evaluation_name("digits", "accuracy"): 0.5})
    assert "quality" not in as_table(summarize({run: "run"}))


def test_the_table_has_the_newest_quality(run: Path, tmp_path: Path) -> None:
    record(run, 128, {KID: 0.02, FID: 9.25}, settings=SETTINGS)
    record(run, 64, {FID: 12.0}, settings=SETTINGS)
    record(run, 256, {FID: 1.0}, settings=SETTINGS)  # the run has gone back behind it
    other = tmp_path / "other"
    other.mkdir()
    found = summarize({run: "run", other: "other"})
    lines = as_table(found).splitlines()
    assert lines[0].endswith("quality")
    assert sorted(line.split()[-1] for line in lines[1:]) == ["-", "9.25"]
    assert json.loads(as_json(found))[0]["quality"] == {KID: 0.02, FID: 9.25}


def test_the_table_names_a_curve_of_other_settings(run: Path) -> None:
    record(run, 64, {FID: 12.0}, settings=SETTINGS)
    record(run, 128, {FID: float("nan")}, settings=SETTINGS | {"seeds": [7, 8]})
    found = summarize({run: "run"})
    assert "fid nan (images@" in as_table(found)
    assert list(json.loads(as_json(found))[0]["quality"].values()) == ["nan"]


def test_status_has_every_curve_with_every_setting(run: Path) -> None:
    record(run, 64, {FID: 12.0, KID: 0.03}, settings=SETTINGS)
    record(run, 128, {FID: 9.25, KID: 0.02}, settings=SETTINGS)
    record(run, 64, {FID: 7.0}, settings=SETTINGS | {"seeds": [7, 8]})
    record(run, 64, {evaluation_name("digits", "accuracy"): 0.5})
    shown = " ".join(status(run).split())
    assert "images 128 fid 9.25, kid 0.02" in shown
    assert "64 fid 7 " in shown
    assert "digits 64 accuracy 0.5" in shown
    assert "images: sampler.name euler, sampler.steps 50, seeds [0, 999], reference.sha256 abc" in shown
    assert "seeds [7, 8]" in shown
