from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pomscale.runs.wandb_id import left_wandb_ids, own_wandb_id, read_wandb_id, replace_wandb_id


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    return folder


def test_a_run_has_one_id(run: Path) -> None:
    assert read_wandb_id(run) is None
    assert left_wandb_ids(run) == {}
    drawn = own_wandb_id(run)
    assert own_wandb_id(run) == read_wandb_id(run) == drawn
    assert left_wandb_ids(run) == {}


def test_a_run_that_was_moved_keeps_it(run: Path) -> None:
    drawn = own_wandb_id(run)
    moved = run.rename(run.parent / "b")
    assert left_wandb_ids(moved) == {}
    assert own_wandb_id(moved) == drawn
    (run.parent / "a").mkdir()  # another run, later
    assert own_wandb_id(run.parent / "a") != drawn
    assert own_wandb_id(moved) == drawn


@pytest.mark.parametrize("is_older", [False, True])
def test_a_copy_has_one_of_its_own(run: Path, caplog: pytest.LogCaptureFixture, is_older: bool) -> None:
    drawn = own_wandb_id(run)
    if is_older:  # no wandb_ids.json; the job says where it was launched
        (run / "wandb_ids.json").unlink()
        (run / "job.json").write_text(json.dumps({"home": str(run)}))
    copy = Path(shutil.copytree(run, run.parent / "copy"))
    assert list(left_wandb_ids(copy)) == [drawn]  # also before its first start
    of_copy = own_wandb_id(copy)
    assert of_copy != drawn
    assert own_wandb_id(copy) == of_copy
    assert own_wandb_id(run) == read_wandb_id(run) == drawn
    assert left_wandb_ids(copy) == {drawn: f"it is that of {run}, and this folder is a copy"}
    assert left_wandb_ids(run) == {}
    assert caplog.text.count(f"the wandb run {drawn} is not continued: it is that of {run}") == 1
    of_second = own_wandb_id(Path(shutil.copytree(copy, run.parent / "second")))
    assert len({drawn, of_copy, of_second}) == 3


def test_a_run_that_was_deleted_on_the_server_has_another(run: Path) -> None:
    drawn = own_wandb_id(run)
    new = replace_wandb_id(run, "it was deleted")
    assert own_wandb_id(run) == new != drawn
    assert left_wandb_ids(run) == {drawn: "it was deleted"}
    (run / "wandb_id.txt").write_text(drawn)  # a kill between the two files
    assert own_wandb_id(run) not in (drawn, new)
