"""The folder of a real run, finished, resumed once, started by hand: what list, status, diff and watch make of it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from launch.status.diff import diff
from launch.status.logs import show_logs
from launch.status.overview import status
from launch.status.runs import find_runs, resolve_run
from launch.status.table import as_json, as_table, list_runs, table
from launch.status.watch import watch
from pomscale.base.errors import InputError
from pomscale.runs.outcome import is_finished, write_outcome
from support.running import GLOBAL_BATCH, train, write_tiny_recipe

STEPS = 10


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs, which holds `tiny`."""
    recipe = write_tiny_recipe(tmp_path_factory.mktemp("runs"), digits)
    for steps in (STEPS // 2, STEPS):
        train(recipe, "schedule={}", f"training.total_samples={steps * GLOBAL_BATCH}")
    return recipe.parent / "runs"


@pytest.fixture
def copied(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/ of the current folder, with `tiny` in it, to be changed at will."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def test_a_line_per_run(runs: Path) -> None:
    head, line = as_table(list_runs([runs])).splitlines()
    assert head.split("  ")[0].strip() == "name"
    assert line.split()[:5] == ["tiny", "finished", "2", "320", "100%"]
    assert line.endswith("ago")


def test_json_has_what_the_table_has(runs: Path) -> None:
    (run,) = json.loads(as_json(list_runs([runs])))
    last = [json.loads(line) for line in (runs / "tiny" / "metrics.jsonl").read_text().splitlines()]
    last_loss = [row["train/loss"] for row in last if "train/loss" in row][-1]
    assert run["home"] == str((runs / "tiny").resolve())
    assert (run["state"], run["num_starts"], run["samples"], run["share"]) == ("finished", 2, STEPS * GLOBAL_BATCH, 1)
    assert run["loss"] == last_loss
    assert run["last_row_unix_s"] == last[-1]["time_unix_s"]
    assert 0 < run["goodput"] < 1
    assert run["eta_s"] is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tiny/outcome.json", "{}"),
        ("tiny/outcome.json", '{"incarnation": 2}'),
        ("tiny/generations/000002", '{"a": 1}'),
        ("tiny/incarnations.jsonl", "{}\n"),
        ("tiny/metrics.jsonl", '{"samples": 1, "time_unix_s": "x", "incarnation": "y"}\n'),
        ("pipe/pipeline.json", "{}"),
        ("pipe/pipeline.json", '{"stages": [{"name": "train"}]}'),
    ],
)
def test_one_folder_with_a_strange_file_does_not_hide_the_others(copied: Path, name: str, content: str) -> None:
    shutil.copytree(copied / "tiny", copied / "good")
    (copied / "pipe").mkdir()
    (copied / name).write_text(content)
    states = {run.name: run.state for run in list_runs([copied]).runs}
    assert states["good"] == "finished"
    assert "tiny" in states
    assert status(copied / "tiny")


@pytest.mark.parametrize("content", ["", '{"state": "fin', "[1, 2]", '{"incarnation": 2}'])
def test_an_outcome_that_cannot_be_read_is_none(copied: Path, content: str) -> None:
    (copied / "tiny" / "outcome.json").write_text(content)
    assert not is_finished(copied / "tiny")
    write_outcome(copied / "tiny", 2, 0, "finished", samples=STEPS * GLOBAL_BATCH)
    assert is_finished(copied / "tiny")


def test_numbers_that_json_lacks(copied: Path) -> None:
    with (copied / "tiny" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"samples": 640, "time_unix_s": 1e9, "incarnation": 2, "train/loss": "nan"}) + "\n")
    found = list_runs([copied])
    assert json.loads(as_json(found))[0]["loss"] == "nan"
    assert " nan " in as_table(found)


def test_newest_first_filtered_by_state(copied: Path) -> None:
    older = Path(shutil.copytree(copied / "tiny", copied / "sweep" / "lr-1"))
    for path in (older / "incarnations.jsonl", older / "generations" / "000002"):
        path.write_text(path.read_text().replace("202", "201").replace('_unix_s": 1', '_unix_s": 0.1'))
    (copied / "begun").mkdir()
    (copied / "begun" / "metrics.jsonl").write_text("")
    (copied / "no run").mkdir()
    assert [run.name for run in list_runs([copied]).runs] == ["tiny", "sweep/lr-1", "begun"]
    assert [run.name for run in list_runs([copied], ["unknown"]).runs] == ["begun"]
    assert list_runs([copied], ["running", "failed"]).runs == []
    with pytest.raises(InputError, match="bogus: no such state"):
        list_runs([copied], ["finished", "bogus"])
    with pytest.raises(InputError, match="no such folder"):
        list_runs([copied / "gone"])
    assert list(find_runs(copied / "tiny").values()) == ["tiny"]


def test_the_stages_of_a_pipeline_wherever_they_are(copied: Path) -> None:
    pipeline = copied.parent / "pipelines" / "digits"
    stages = [{"name": "verify", "home": str(pipeline / "verify")}, {"name": "train", "home": str(copied / "tiny")}]
    shutil.copytree(copied / "tiny", pipeline / "verify")
    (pipeline / "pipeline.json").write_text(json.dumps({"stages": stages}))
    assert sorted(find_runs(Path("pipelines")).values()) == [str(copied / "tiny"), "digits/verify"]
    assert sorted(find_runs(pipeline).values()) == [str(copied / "tiny"), "verify"]


def test_what_cannot_be_looked_into_hides_no_run(copied: Path) -> None:
    (copied / "loop").symlink_to("loop")
    (copied / "odd" / "pipeline.json").mkdir(parents=True)  # as unreadable to root as a private folder is to others
    assert list(find_runs(copied).values()) == ["tiny"]


def test_a_run_by_path_name_or_beginning(copied: Path) -> None:
    assert resolve_run(str(copied / "tiny")) == copied / "tiny"
    assert resolve_run("tiny") == resolve_run("ti") == Path("runs/tiny")
    shutil.copytree(copied / "tiny", copied / "tiny-2")
    assert resolve_run("tiny") == Path("runs/tiny")  # the whole name
    with pytest.raises(InputError, match="several runs have this name: runs/tiny, runs/tiny-2"):
        resolve_run("ti")
    with pytest.raises(InputError, match=r"no run of that name in runs/"):
        resolve_run("tony")
    with pytest.raises(InputError, match=r"none of .*metrics\.jsonl"):
        resolve_run(str(copied / "tiny" / "checkpoints"))


def test_status_tells_the_story(copied: Path) -> None:
    told = status(Path("runs/tiny"))
    assert told.splitlines()[0] == "tiny: finished"
    assert "320 of 320 samples (100.0%)" in told
    assert "runs/tiny/checkpoints/samples-000000000320" in told
    starts = [line.split() for line in told.splitlines() if line.endswith("finished")][1:]
    assert [words[-4:] for words in starts] == [["0", "-", "160", "finished"], ["160", "-", "320", "finished"]]
    assert "train/loss" in told
    assert "productive" in told
    assert "  pomscale report runs/tiny" in told
    Path("runs/tiny").rename("runs/a tiny")
    assert "  pomscale report 'runs/a tiny'" in status(Path("runs/a tiny"))


def test_status_of_a_run_that_failed_says_why_and_what_to_type(copied: Path) -> None:
    (copied / "tiny" / "outcome.json").unlink()
    write_outcome(copied / "tiny", 2, 1, "failed", reason="rank 1: OSError: no disk")
    told = status(Path("runs/tiny"))
    assert told.startswith("tiny: failed\n")
    assert "why         rank 1: OSError: no disk" in told
    assert "  pomscale train runs/tiny/recipe.yaml" in told


def test_logs_of_a_run_by_hand(runs: Path) -> None:
    with pytest.raises(InputError, match="not started by `pomscale launch`"):
        show_logs(runs / "tiny", rank=0, lines=None, start=None, follow=True)


def test_diff_shows_what_differs_and_nothing_else(copied: Path) -> None:
    other = Path(shutil.copytree(copied / "tiny", copied / "other"))
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.003", "lr: 0.01").replace("name: tiny", "name: other"))
    metrics = other / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        if "train/loss" in row:
            row["train/loss"] *= 1.5
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = diff(copied / "tiny", other).splitlines()
    assert told[0].split() == ["recipe", "tiny", "other"]
    assert told[1].split() == ["optimizer.lr", "0.003", "0.01"]
    assert told[2] == ""
    assert "code: the same" in told
    assert "data: the same" in told
    last = told[-1].split()
    assert (last[0], last[-1]) == ("320", "+50.00%")


def test_diff_of_two_objectives_compares_the_loss_that_both_have(copied: Path) -> None:
    other = Path(shutil.copytree(copied / "tiny", copied / "other"))
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("objective: flow", "objective: x"))
    told = diff(copied / "tiny", other)
    assert "losses of training: not compared, since the objectives measure different things" in told
    assert "training loss at" not in told
    assert "held-out loss at" not in told


def test_diff_needs_recipes(copied: Path) -> None:
    (copied / "tiny" / "recipe.yaml").unlink()
    with pytest.raises(InputError, match=r"holds no recipe\.yaml"):
        diff(copied / "tiny", copied / "tiny")


def test_one_frame_of_watch(runs: Path) -> None:
    screen = io.StringIO()
    watch(runs / "tiny", once=True, console=Console(file=screen, width=100))
    shown = screen.getvalue()
    assert "finished  start 2" in shown
    assert "100.0%  320 of 320 samples" in shown
    assert "■ productive" in shown
    assert "samples-000000000320" in shown
    assert any("⠀" < character <= "⣿" for character in shown)
    assert max(map(len, shown.splitlines())) <= 100


def test_what_a_log_tells_the_terminal_does_not_reach_it(copied: Path) -> None:
    (copied / "tiny" / "logs").mkdir()
    (copied / "tiny" / "logs" / "rank-00000.log").write_text("\x1b[31mred\x1b[0m, \x1b[2K\x1b[1Aup\n[1/2] <b> plain\n")
    console = Console(file=io.StringIO(), width=100)
    watch(copied / "tiny", once=True, console=console)
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in drawn
    assert "│ red, up " in drawn
    assert "│ [1/2] <b> plain " in drawn


def test_table() -> None:
    assert table(["a", "number"], [["long word", "1"], ["b", "22"]], right=["number"]).splitlines() == [
        "a          number",
        "long word       1",
        "b              22",
    ]
