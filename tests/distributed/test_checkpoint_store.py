"""The rules of checkpoint folders: complete or ignored, never two half ones, garbage goes, good ones stay."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pomscale.base.errors import InputError, PomscaleError
from pomscale.checkpoint import staging
from pomscale.checkpoint.staging import HostCopy
from pomscale.checkpoint.store import (
    CheckpointStore,
    complete_checkpoints,
    find_checkpoint,
    latest_checkpoint,
    read_meta,
)
from pomscale.config.engine import CheckpointConfig
from pomscale.distributed.flat_shard import FlatShard
from pomscale.distributed.world import join_world
from pomscale.runs import checkpoint_folder
from pomscale.runs.integrity import find_damage, seal
from pomscale.runs.layout import CHECKPOINT_META
from pomscale.runs.starts import Start, Superseded
from support.running import mounted_disk, run

WORKER = Path(__file__).with_name("checkpoint_worker.py")


@pytest.fixture(autouse=True)
def world(request: pytest.FixtureRequest) -> Iterator[None]:
    with join_world("cpu"):
        yield


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"weight": torch.full((300, 200), float(value)), "step": torch.tensor(float(value))}}


def open_store(root: Path, start: Start | None = None, **config: object) -> CheckpointStore:
    return CheckpointStore(root, CheckpointConfig.model_validate({"every_samples": 10, **config}), start)


def save(store: CheckpointStore, samples: int) -> None:
    store.save(samples, state(samples), {"samples": samples})
    store.wait()


def samples(root: Path) -> list[int]:
    return [checkpoint_folder.samples_of(path) for path in complete_checkpoints(root)]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_two_ranks(tmp_path: Path) -> None:
    """Shards, damage, a rank that cannot write, a newer start: see checkpoint_worker.py."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run([sys.executable, *launcher, str(WORKER), str(tmp_path)])
    assert done.stdout.count("ranks agree") == 2
    assert done.stderr.count("DAMAGED") == 1


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_was_saved_is_loaded_although_training_went_on(tmp_path: Path, asynchronous: bool) -> None:
    store = open_store(tmp_path, asynchronous=asynchronous)
    live = state(1.0)
    stall_s = store.save(10, live, {"samples": 10})
    live["model"]["weight"].fill_(7.0)  # the next step, while the save may still be under way
    saved = store.wait()
    assert saved is not None
    assert (saved.samples, saved.stall_s) == (10, stall_s)
    assert 0 < stall_s <= saved.total_s
    assert saved.num_bytes > live["model"]["weight"].nbytes
    assert store.poll() is None  # told once
    loaded = state(0.0)
    newest = store.newest()
    assert newest == latest_checkpoint(tmp_path) == find_checkpoint(newest)  # type: ignore[arg-type]
    store.load(newest, loaded)  # type: ignore[arg-type]
    assert loaded["model"]["weight"].eq(1.0).all()
    assert loaded["model"]["step"] == 1.0
    with pytest.raises(PomscaleError, match="never overwritten"):
        save(store, 10)
    assert store.newest() == newest


def test_host_copies_keep_their_memory_and_share_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_PIECE_BYTES", 1000)  # several pieces, and one tensor larger than a piece
    live = {
        "a": {"first": torch.randn(20, 10), "none": torch.empty(0, 3), "scalar": torch.tensor(1.5)},
        "b": {"half": torch.randn(33).bfloat16(), "turned": torch.randn(4, 50).t(), "count": torch.tensor(7)},
        "flat": FlatShard((4, 5), 3, torch.randn(9)),
        "large": torch.randn(1000),
    }
    copies = HostCopy()
    taken = copies.take(live)
    before = {name: tensor.data_ptr() for name, tensor in taken.items() if name != "flat"}
    live["a"]["first"].fill_(3.0)
    live["flat"].values.fill_(4.0)
    again = copies.take(live)
    assert {name: tensor.data_ptr() for name, tensor in again.items() if name != "flat"} == before
    for name, tensor in staging.leaves(live):
        if isinstance(tensor, FlatShard):
            assert (again[name].shape, again[name].start) == ((4, 5), 3)  # type: ignore[attr-defined]
            assert again[name].values.eq(4.0).all()  # type: ignore[operator]
        else:
            assert again[name].equal(tensor)
            assert again[name].dtype == tensor.dtype
            # torch.save writes whole storages: a shared one would be written once per tensor.
            assert again[name].untyped_storage().nbytes() == tensor.nbytes
    live["a"]["scalar"] = torch.randn(5)
    assert copies.take(live)["a.scalar"].equal(live["a"]["scalar"])  # another layout: memory anew


def test_the_last_the_rare_and_the_best_are_kept_also_over_a_restart(tmp_path: Path) -> None:
    rules = {"keep_last": 1, "keep_every_samples": 40, "keep_best": 1, "best_metric": "loss"}
    store = open_store(tmp_path, **rules)
    for n, loss in ((10, 0.5), (20, 0.1), (30, 0.3), (40, 0.4)):
        store.save(n, state(n), {"samples": n})
        store.record_metrics(n, {"loss": loss, "other": 0.0})  # the save may still be under way
    store.wait()
    assert samples(tmp_path) == [20, 40]
    store = open_store(tmp_path, **rules)
    store.record_metrics(999, {"loss": 0.0})  # nothing was saved there
    save(store, 50)
    save(store, 60)
    assert samples(tmp_path) == [20, 40, 60]
    store.record_metrics(60, {"loss": 0.05})
    save(store, 70)
    assert samples(tmp_path) == [40, 60, 70]


def test_the_remains_of_killed_saves_and_deletions_are_ignored_and_cleared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "checkpoints"
    Start.claim(tmp_path)
    half_written, half_deleted = root / "samples-000000000020.g00001.partial", root / "samples-000000000010"
    damaged = root / "samples-000000000005.damaged"
    for path in (half_written, half_deleted, damaged):
        path.mkdir(parents=True)
        (path / "__0_0.distcp").write_bytes(b"torn")
    assert latest_checkpoint(root) is None
    errors = capsys.readouterr().err
    assert f"{half_written} has no COMPLETE marker" in errors
    assert f"{half_deleted} has no COMPLETE marker" in errors
    save(open_store(root, Start.claim(tmp_path)), 10)
    assert names(root) == [damaged.name, half_deleted.name]  # the one deleted by half is replaced
    assert samples(root) == [10]


def test_a_stale_start_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    stale = open_store(root, Start.claim(tmp_path), keep_last=1, keep_best=1, best_metric="loss")
    save(stale, 10)
    stale.record_metrics(10, {"loss": 1.0})
    live = open_store(root, Start.claim(tmp_path), keep_last=3)
    (root / "samples-000000000005").mkdir()  # remains, not the stale start's to clear
    before = names(root)
    stale.save(20, state(20), {"samples": 20})
    with pytest.raises(Superseded, match=r"a newer start .* has taken over"):
        stale.wait()
    stale.record_metrics(10, {"loss": 0.0})
    assert '"10": 1.0' in (root / "judged.json").read_text()
    (root / "samples-000000000010" / ".metadata").write_bytes(b"damaged")
    with pytest.raises(Superseded):
        stale.newest()
    assert names(root) == before
    assert live.newest() is None
    assert (root / "samples-000000000010.damaged").is_dir()


def test_a_file_system_that_hides_the_generations_stops_what_matters_and_only_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, hidden = tmp_path / "checkpoints", tmp_path / "hidden"
    store = open_store(root, Start.claim(tmp_path), best_metric="loss")
    save(store, 10)
    (tmp_path / "generations").rename(hidden)
    store.record_metrics(10, {"loss": 1.0})
    assert "cannot be read" in capsys.readouterr().err
    store.save(20, state(20), {"samples": 20})
    with pytest.raises(PomscaleError, match="generations cannot be read"):
        store.wait()
    hidden.rename(tmp_path / "generations")
    save(store, 20)
    assert samples(root) == [10, 20]


def test_two_starts_that_write_the_same_samples_never_mix(tmp_path: Path) -> None:
    """The stale one has passed its last look at the generations when the newer one commits: the rename itself fails."""
    final = checkpoint_folder.final_folder(tmp_path, 10)
    stale, newer = (checkpoint_folder.partial_folder(final, start) for start in (1, 2))
    for partial in (stale, newer):
        seal(partial, {CHECKPOINT_META: checkpoint_folder.begin(partial, {"by": partial.name})})
    checkpoint_folder.commit(newer, final)
    with pytest.raises(OSError, match="not empty"):
        checkpoint_folder.commit(stale, final)
    assert find_damage(final) is None
    assert read_meta(final) == {"by": newer.name}


def test_what_training_went_back_from_is_forgotten(tmp_path: Path) -> None:
    store = open_store(tmp_path, keep_last=9)
    for n in (10, 20, 30):
        store.save(n, state(n), {"samples": n})
    store.forget_after(10)
    assert samples(tmp_path) == [10]
    save(store, 20)
    assert samples(tmp_path) == [10, 20]


def test_a_folder_that_is_asked_for_is_refused_when_damaged(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 10)
    meta = tmp_path / "samples-000000000010" / "checkpoint.json"
    meta.write_text(meta.read_text().replace("10", "11"))
    with pytest.raises(InputError, match=r"checkpoint\.json is not what was written.* there is no other one beside it"):
        read_meta(meta.parent)
    save(store, 20)
    with pytest.raises(InputError, match=r"use another one, e\.g\. .*samples-000000000020$"):
        read_meta(meta.parent)
    with pytest.raises(InputError, match=r"checkpoint\.json is not what was written"):
        store.check(meta.parent)


@pytest.fixture
def undeletable(tmp_path: Path) -> Iterator[Path]:
    """A folder that even root cannot delete: a file system is mounted on it. For others, one without rights."""
    inside = tmp_path / "checkpoints" / "samples-000000000010" / "busy"
    yield inside
    if os.path.ismount(inside):
        subprocess.run(["umount", inside], check=True)
    elif inside.exists():
        inside.parent.chmod(0o755)


def test_garbage_that_cannot_be_deleted_costs_a_warning_and_nothing_else(
    undeletable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "checkpoints"
    store = open_store(root, keep_last=1)
    save(store, 10)
    undeletable.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", undeletable], capture_output=True, check=False).returncode:
        if os.geteuid() == 0:
            pytest.skip("root without the right to mount deletes everything")
        undeletable.parent.chmod(0o555)
    save(store, 20)
    assert "could not be deleted" in capsys.readouterr().err
    assert samples(root)[-1] == 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with space for two and a half checkpoints and their small files."""
    with mounted_disk(tmp_path / "disk", "640k") as disk:
        yield disk


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_or_a_read_only_one_keeps_what_is_there(small_disk: Path, asynchronous: bool) -> None:
    store = open_store(small_disk / "checkpoints", asynchronous=asynchronous)
    save(store, 10)
    save(store, 20)
    message = (
        r"samples-000000000030: the checkpoint could not be written; [\d.]+ MiB are free there \(rank 0: \[Errno 28\]"
    )
    with pytest.raises(PomscaleError, match=message):
        save(store, 30)
    assert names(store.root) == ["samples-000000000010", "samples-000000000020"]
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(PomscaleError, match=r"samples-000000000030: .*Read-only file system"):
        save(store, 30)
    subprocess.run(["mount", "-o", "remount,rw,size=2m", small_disk], check=True)
    loaded = state(0.0)
    store.load(store.newest(), loaded)  # type: ignore[arg-type]
    assert loaded["model"]["weight"].eq(20).all()
    save(store, 30)
    assert samples(store.root) == [20, 30]


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    store = open_store(tmp_path / "checkpoints", asynchronous=False)
    with pytest.raises(PomscaleError, match=r"samples-000000000010: the checkpoint could not be written"):
        store.save(10, state(1.0), {"samples": 10})
