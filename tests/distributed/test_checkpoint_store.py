"""The rules of checkpoint folders: complete or ignored, never two half ones, garbage goes, good ones stay."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pomscale.checkpoint.store import MARKER, CheckpointStore, complete_checkpoints, latest_checkpoint, read_meta
from pomscale.distributed.world import join_world
from pomscale.errors import PomscaleError


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with join_world("cpu"):
        yield


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"weight": torch.full((3, 2), value), "step": torch.tensor(value)}}


def samples(folders: list[Path]) -> list[int]:
    return [read_meta(folder)["samples"] for folder in folders]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_was_saved_is_loaded_although_training_went_on(tmp_path: Path, asynchronous: bool) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, asynchronous=asynchronous)
    live = state(1.0)
    store.save(10, live, {"samples": 10})
    live["model"]["weight"].fill_(7.0)  # the next step, while the save may still be under way
    store.wait()
    loaded = state(0.0)
    store.load(latest_checkpoint(tmp_path), loaded)  # type: ignore[arg-type]
    assert loaded["model"]["weight"].eq(1.0).all()
    assert loaded["model"]["step"] == 1.0


def test_the_last_ones_are_kept_and_older_remains_are_cleared(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, asynchronous=False)
    torn = tmp_path / "samples-000000000005"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"torn")
    for n in (10, 20, 30):
        store.save(n, state(n), {"samples": n})
        store.wait()
    assert samples(complete_checkpoints(tmp_path)) == [20, 30]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples-000000000020", "samples-000000000030"]


def test_the_remains_of_a_killed_save_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, asynchronous=False)
    torn = tmp_path / "samples-000000000010"
    torn.mkdir()
    (torn / ".metadata").write_bytes(b"torn")
    assert latest_checkpoint(tmp_path) is None
    assert f"{torn} has no {MARKER} marker" in capsys.readouterr().err
    store.save(10, state(1.0), {"samples": 10})
    store.wait()
    assert latest_checkpoint(tmp_path) == torn


def test_garbage_that_cannot_be_deleted_costs_a_warning_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(tmp_path, keep_last=1, asynchronous=False)
    store.save(10, state(1.0), {"samples": 10})
    store.wait()

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    # root may delete anything, so a folder that NFS holds open can only be played
    monkeypatch.setattr(shutil, "rmtree", busy)
    store.save(20, state(2.0), {"samples": 20})
    store.wait()
    assert "could not be deleted" in capsys.readouterr().err
    assert samples(complete_checkpoints(tmp_path)) == [20]


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1, asynchronous=False)
    with pytest.raises(PomscaleError, match=r"samples-000000000010: the checkpoint could not be written"):
        store.save(10, state(1.0), {"samples": 10})
