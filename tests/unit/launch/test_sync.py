"""Offline wandb folders, recorded by wandb itself, uploaded by its own command to a server on this machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.status.sync import NotLoggedIn, Synced, sync, watch_and_sync
from pomscale.base.errors import PomscaleError
from pomscale.runs.starts import Start
from pomscale.runs.wandb_id import own_wandb_id, read_wandb_id
from support.wandb_store import KEY, WandbStore, wandb_store

_RECORD = """
import os, sys, time, psutil, wandb
folder, first, is_killed = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "killed"
run = wandb.init(mode="offline", id="abc", project="p", dir=folder, settings=wandb.Settings(console="off", quiet=True))
num_rows = 2000 if is_killed else 5
for samples in range(first, first + num_rows):
    run.log({"samples": samples, "train/loss": 1 / (1 + samples)})
if is_killed:  # with its service, as when a node dies, once some of its rows have been written
    while os.path.getsize(os.path.join(run.dir, "..", "run-abc.wandb")) <= 2 * 32768:
        time.sleep(0.1)
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(9)
run.finish()
"""

_CLAIM = """
import sys, pathlib
from pomscale.runs.starts import Start
from pomscale.runs.wandb_id import own_wandb_id, read_wandb_id
Start.claim(pathlib.Path(sys.argv[1]))
"""
_LOCK = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.readline()
"""


def record(folder: Path, first: int, *, killed: bool = False) -> Path:
    """One start of a run that logs five rows; where wandb has put them."""
    before = set((folder / "wandb").glob("offline-run-*"))
    words = [sys.executable, "-c", _RECORD, str(folder), str(first), "killed" if killed else ""]
    subprocess.run(words, check=not killed, timeout=200)
    (new,) = set((folder / "wandb").glob("offline-run-*")) - before
    return new


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two starts of one run."""
    folder = tmp_path_factory.mktemp("sync") / "tiny"
    folder.mkdir()
    record(folder, 0)
    record(folder, 5)
    return folder


@pytest.fixture
def job_folder(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which nobody has uploaded."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(recorded, tmp_path / "tiny", symlinks=True))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStore]:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with wandb_store() as store:
        monkeypatch.setenv("WANDB_BASE_URL", store.url)
        yield store


def test_all_starts_become_one_run_and_are_uploaded_once(job_folder: Path, server: WandbStore) -> None:
    said: list[str] = []
    assert sync({job_folder: "tiny"}, said.append) == Synced(2, 0)
    assert server.samples("abc") == list(range(10))
    assert [row["_step"] for _, row in sorted(server.lines["abc"].items())] == list(range(10))
    assert any("(2 of 2)" in line for line in said)
    assert [path.name for path in Path.cwd().iterdir()] == ["tiny"]  # wandb's own logs lie in the run folder
    uploads = server.uploads
    assert sync({job_folder: "tiny"}, said.append) == Synced(0, 0)
    assert server.uploads == uploads
    third = record(job_folder, 10)
    assert sync({job_folder: "tiny"}, said.append) == Synced(1, 0)
    assert server.samples("abc") == list(range(15))
    assert any(third.glob("*.synced"))


def test_what_is_still_being_written_waits(job_folder: Path, server: WandbStore) -> None:
    """A start that lives has no end in its file; that of one that was killed never gets one."""
    record(job_folder, 10, killed=True)
    Start.claim(job_folder)  # by this process, which lives
    assert sync({job_folder: "tiny"}, print) == Synced(2, 1)
    assert server.samples("abc") == list(range(10))
    subprocess.run([sys.executable, "-c", _CLAIM, str(job_folder)], check=True)  # by a process that is gone
    assert sync({job_folder: "tiny"}, print) == Synced(1, 0)
    assert sync({job_folder: "tiny"}, print) == Synced(0, 0)
    num_samples = len(server.samples("abc"))
    assert num_samples > 10
    assert server.samples("abc") == list(range(num_samples))


def test_again_and_again_whatever_happens(job_folder: Path, server: WandbStore) -> None:
    said: list[str] = []
    rounds = iter([OSError("the disk is away"), {job_folder: "tiny"}, {job_folder: "tiny"}, KeyboardInterrupt()])

    def find() -> dict[Path, str]:
        found = next(rounds)
        if isinstance(found, BaseException):
            raise found
        return found

    with pytest.raises(KeyboardInterrupt):
        watch_and_sync(find, minutes=0.001, show=said.append)
    told = [line.partition(": ")[2] for line in said if "still being written" in line or "next try" in line]
    assert told[0].startswith("the disk is away; the next try is in ")
    assert told[1:] == ["2 uploaded, 0 still being written", "0 uploaded, 0 still being written"]


def test_two_at_once_do_not_upload_twice(job_folder: Path, server: WandbStore) -> None:
    said: list[str] = []
    lock = str(job_folder / "wandb" / ".pomscale-sync.lock")
    locked = subprocess.Popen(
        [sys.executable, "-c", _LOCK, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert locked.stdout is not None
    locked.stdout.readline()
    try:
        assert sync({job_folder: "tiny"}, said.append) == Synced(0, 0)
    finally:
        locked.communicate("\n", timeout=30)
    assert said == ["tiny: another `runs sync` is uploading it"]
    assert not server.lines


def test_a_run_that_cannot_be_written_holds_up_no_other(job_folder: Path, server: WandbStore) -> None:
    odd = Path(shutil.copytree(job_folder, job_folder.parent / "odd"))
    (odd / "wandb" / ".pomscale-sync.lock").mkdir()  # as little to be opened by root as a colleague's by others
    with pytest.raises(PomscaleError, match=r"odd: left out: .*sync\.lock"):
        sync({odd: "odd", job_folder: "run"}, lambda line: None)
    assert sync({job_folder: "run"}, lambda line: None) == Synced(0, 0)


def test_without_a_login_it_says_so(job_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(NotLoggedIn, match="wandb login"):
        sync({job_folder: "tiny"}, print)
    assert not list(job_folder.glob("wandb/*/*.synced"))


def test_a_torn_log_does_not_hold_up_what_comes_after_it(job_folder: Path, server: WandbStore) -> None:
    first = min(job_folder.glob("wandb/offline-run-*"))
    next(first.glob("*.wandb")).write_bytes(b"no log at all")
    with pytest.raises(PomscaleError, match=f"{first.name}: left out: .*Failed to read"):
        sync({job_folder: "tiny"}, print)
    assert server.samples("abc") == list(range(5, 10))


def test_a_run_that_was_deleted_on_the_server_holds_up_no_other(job_folder: Path, server: WandbStore) -> None:
    """wandb would ask again for hours, silently."""
    (job_folder / "wandb_id.txt").write_text("abc\n")
    other = Path(shutil.copytree(job_folder, job_folder.parent / "other"))
    for folder in (other / "wandb").glob("offline-run-*"):
        (folder / "run-abc.wandb").rename(folder / "run-other.wandb")
        folder.rename(folder.with_name(folder.name.replace("abc", "other")))
    server.deleted.add("abc")
    with pytest.raises(PomscaleError, match=r"409: run p/abc was previously created and deleted.*`wandb sync --id"):
        sync({job_folder: "tiny"}, print)
    assert read_wandb_id(job_folder) != "abc"
    said: list[str] = []
    server.deleted.clear()
    assert sync({job_folder: "tiny", other: "other"}, said.append) == Synced(2, 0)
    assert said[0].startswith("tiny: wandb run abc left out (2 recordings): it was deleted on wandb's server")


def test_a_copy_of_a_run_leaves_the_recordings_of_the_original_to_it(job_folder: Path, server: WandbStore) -> None:
    (job_folder / "wandb_id.txt").write_text("abc\n")
    assert own_wandb_id(job_folder) == "abc"
    copy = Path(shutil.copytree(job_folder, job_folder.parent / "copy"))
    said: list[str] = []
    assert sync({copy: "copy"}, said.append) == Synced(0, 0)
    assert said[0].startswith("copy: wandb run abc left out (2 recordings): it is that of")
    assert sync({copy: "copy", job_folder: "tiny"}, said.append) == Synced(2, 0)
    assert server.samples("abc") == list(range(10))


def test_a_start_that_was_killed_at_once_has_nothing_to_upload(job_folder: Path, server: WandbStore) -> None:
    first = min(job_folder.glob("wandb/offline-run-*"))
    file = next(first.glob("*.wandb"))
    file.write_bytes(file.read_bytes()[:7])
    assert sync({job_folder: "tiny"}, print) == Synced(1, 0)


def test_a_log_that_a_kill_has_cut_off_is_uploaded_once(job_folder: Path, server: WandbStore) -> None:
    """wandb itself sends what there is, and would send it again."""
    file = next(min(job_folder.glob("wandb/offline-run-*")).glob("*.wandb"))
    file.write_bytes(file.read_bytes()[:-3])
    said: list[str] = []
    assert sync({job_folder: "tiny"}, said.append) == Synced(2, 0)
    assert any("ends with an incomplete record" in line for line in said)
    assert server.samples("abc") == list(range(10))
    assert sync({job_folder: "tiny"}, said.append) == Synced(0, 0)
