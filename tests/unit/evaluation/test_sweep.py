"""Sweeps over one checkpoint: axes, the table of results, the U-curve."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from pomscale.base.errors import InputError
from pomscale.evaluation.sweep import (
    SweepResult,
    best_point,
    grid,
    parse_axes,
    point_name,
    quality_panel,
    read_results,
    text_table,
    write_tables,
)


def test_axes_are_read_from_one_word_or_several() -> None:
    expected = {"guidance": ["0", "1.5"], "interval": ["0:1", "0:0.9"], "average": ["ema", "model"]}
    assert parse_axes(["guidance=0,1.5,interval=0:1,0:0.9", "average=ema,model"]) == expected
    points = grid(expected)
    assert len(points) == 8
    assert points[1] == {"guidance": "0", "interval": "0:1", "average": "model"}
    assert point_name(points[-1]) == "guidance=1.5_interval=0-0.9_average=model"


@pytest.mark.parametrize("word", ["1,2", "guidance=", "guidance=1,,2", "guidance=1,1", "=1", "a=1,a=2"])
def test_what_is_no_axis_is_refused(word: str) -> None:
    with pytest.raises(InputError, match="--sweep"):
        parse_axes([word])


def test_values_that_share_a_folder_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be in the name of a folder"):
        grid({"guide": ["a/b", "a:b"]})


def test_no_point_is_best_where_they_were_measured_differently(tmp_path: Path) -> None:
    axes = {"guidance": ["0"], "measured-frames": ["8", "16"]}
    measured(tmp_path, axes, {"guidance=0_measured-frames=8": 4.0, "guidance=0_measured-frames=16": 9.0})
    results = read_results(tmp_path, grid(axes))
    assert best_point(results) is None
    assert "best" not in text_table(results)


def measured(folder: Path, axes: dict[str, list[str]], fid: dict[str, float]) -> None:
    for point in grid(axes):
        name = point_name(point)
        if name in fid:
            (folder / name).mkdir()
            content = {"metrics": {"precision": 0.5, "fid": fid[name]}, "settings": {"sampling": point}}
            (folder / name / "result.json").write_text(json.dumps(content))


def test_one_table_of_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    axes = {"guidance": ["0", "1", "2"], "average": ["ema", "model"]}
    fid = {"guidance=0_average=ema": 9.0, "guidance=1_average=ema": 4.0, "guidance=2_average=ema": 6.5}
    measured(tmp_path, axes, fid | {"guidance=0_average=model": 20.0})
    results = read_results(tmp_path, grid(axes))
    best = best_point(results)
    assert best is not None
    assert best.point == {"guidance": "1", "average": "ema"}
    lines = [line.split() for line in text_table(results).splitlines()]
    assert lines[0] == ["guidance", "average", "precision", "fid"]
    assert lines[3] == ["1", "ema", "0.5", "4", "best"]
    assert lines[4] == ["1", "model", "-", "-", "no", "result", "yet"]
    write_tables(tmp_path, results)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"guidance": "0", "average": "ema", "precision": "0.5", "fid": "9.0"}
    assert rows[3]["fid"] == ""
    table = json.loads((tmp_path / "sweep.json").read_text())
    assert table[0]["settings"] == {"sampling": {"guidance": "0", "average": "ema"}}
    panel = quality_panel(results)
    assert panel is not None
    assert panel.lines == {"average ema": ([0.0, 1.0, 2.0], [9.0, 4.0, 6.5]), "average model": ([0.0], [20.0])}
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size == (780, 450)


def test_the_best_is_the_highest_where_higher_is_better_and_never_what_is_no_number() -> None:
    values = {"0": 0.5, "1": 0.7, "2": float("nan"), "3": 0.6}
    for metric, best in (("precision", "1"), ("coverage", "1"), ("clip_score", "1"), ("kid", "0"), ("fid", "0")):
        results = [SweepResult({"guidance": at}, {metric: value}, {}) for at, value in values.items()]
        found = best_point(results[::-1])
        assert found is not None
        assert found.point == {"guidance": best}
    assert best_point(results[1:3]) is None


def test_seeds_are_the_spread_of_a_line(tmp_path: Path) -> None:
    axes = {"seed": ["0", "1000"], "guidance": ["0", "1"]}
    measured(
        tmp_path,
        axes,
        {"seed=0_guidance=0": 9.0, "seed=1000_guidance=0": 11.0, "seed=0_guidance=1": 4.0, "seed=1000_guidance=1": 4.0},
    )
    panel = quality_panel(read_results(tmp_path, grid(axes)))
    assert panel is not None
    assert (panel.title, panel.x_name) == ("fid against guidance", "guidance")
    assert panel.lines == {"fid": ([0.0, 1.0], [10.0, 4.0])}
    (x, low, high) = panel.bands["fid"]
    assert list(x) == [0.0, 1.0]
    assert [a - b for a, b in zip(high, low, strict=True)] == pytest.approx([2 * 2**0.5, 0.0])


def test_without_numbers_or_results_nothing_is_drawn(tmp_path: Path) -> None:
    axes = {"average": ["ema", "model"]}
    results = read_results(tmp_path, grid(axes))
    assert quality_panel(results) is None
    assert text_table(results).count("no result yet") == 2
    write_tables(tmp_path, results)
    assert not (tmp_path / "sweep.png").exists()
    (tmp_path / "average=ema").mkdir()
    (tmp_path / "average=ema" / "result.json").write_text("{}")
    with pytest.raises(InputError, match=r"result.json: not a result"):
        read_results(tmp_path, grid(axes))
