"""A supervisor, and its job's files, where the folder is not as it should be. No SLURM, no ranks."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.node import supervisor as supervisor_module
from launch.node.identity import RankIdentity
from launch.node.signals import SignalForwarder
from launch.node.supervisor import Supervisor
from launch.record.job import (
    Ending,
    JobSpec,
    LaunchedAs,
    StartRecord,
    Submission,
    Verdict,
    ending_path,
    keep,
    read_starts,
    read_submissions,
    start_folder,
)
from launch.submission.submit import record_submission
from pomscale.base.errors import PomscaleError
from pomscale.runs.layout import JOBS_FILE


def supervisor(job_folder: Path, job_id: str, *, restart: int = 0, evaluations: bool = False) -> Supervisor:
    spec = JobSpec(str(job_folder), "x", [["info"]], str(job_folder), evaluations=evaluations)
    identity = RankIdentity(0, "n1", job_id, restart, ("n1",), on_slurm=False)
    # Without its handlers: this process is the tests'.
    forwarding = SignalForwarder.__new__(SignalForwarder)
    forwarding.first, forwarding.send = None, None
    return Supervisor(spec, identity, start_folder(job_folder, job_id, restart), forwarding)


def verdict_on(job_folder: Path, job_id: str, restart: int = 0) -> Verdict:
    return Verdict.read(start_folder(job_folder, job_id, restart) / "verdict.json")


def ended(returncode: int) -> Ending:
    return Ending(0, "n1", 1, time.time(), time.time(), returncode)


def child() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["true"])


def test_a_task_of_an_array_leaves_the_others_alone(tmp_path: Path) -> None:
    """They run side by side in one home: that another has no verdict yet does not mean that it has died."""
    first, second = supervisor(tmp_path, "7_0"), supervisor(tmp_path, "7_1")
    assert first.begin() is None
    assert second.begin() is None
    assert [start.verdict for start in read_starts(tmp_path)] == [None, None]
    again = supervisor(tmp_path, "7_1", restart=1)
    assert again.begin() is not None
    assert verdict_on(tmp_path, "7_1").action == "leave"
    assert not (start_folder(tmp_path, "7_0", 0) / "verdict.json").exists()


def test_what_cannot_be_read_of_an_earlier_start_ends_no_later_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (start, verdict) in enumerate([("{", "{}"), ('{"job_id": "4"}', None), (None, '{"action": "do')]):
        folder = start_folder(tmp_path, str(number), 0)
        folder.mkdir(parents=True)
        written = json.dumps({"job_id": str(number), "restart": 0, "hosts": [], "ranks_per_node": 1})
        (folder / "start.json").write_text(
            start or written[:-1] + ', "started_unix_s": 1, "newest_generation": 0, "of_a_newer_version": 1}'
        )
        if verdict is not None:
            (folder / "verdict.json").write_text(verdict)
    begun = supervisor(tmp_path, "9")
    begun.begin()
    assert begun.conclude(ended(0)) == 0
    assert verdict_on(tmp_path, "9").action == "done"
    assert [start.record.job_id for start in read_starts(tmp_path)] == ["2", "9"]
    assert f"{start_folder(tmp_path, '0', 0)}/start.json cannot be read" in capsys.readouterr().err


def test_a_file_system_that_stutters_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stale(self: Supervisor, *arguments: object) -> None:
        raise OSError(116, "Stale file handle")

    begun = supervisor(tmp_path, "9")
    begun.begin()
    monkeypatch.setattr(Supervisor, "_look_at_other_ranks", stale)
    for _ in range(2):
        begun._looked_s = 0.0
        begun.poll(child())
    assert capsys.readouterr().err.count("Stale file handle") == 1


def test_a_full_disk_does_not_hide_that_a_job_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, what: object) -> None:
        raise PomscaleError(f"cannot write {path}: No space left on device")

    begun = supervisor(tmp_path, "9")
    begun.begin()
    monkeypatch.setattr(supervisor_module, "keep", full)
    assert begun.conclude(ended(0)) == 0
    told = capsys.readouterr()
    assert "done: finished" in told.out
    assert "No space left on device" in told.err


def test_evaluations_that_cannot_be_set_up_are_no_matter_to_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(tmp_path / "launch.json", LaunchedAs("launch/recipe.yaml", "here", {}, 1, None, []))  # and no recipe there
    supervisor(tmp_path, "9", evaluations=True).begin()
    assert "no checkpoint is evaluated" in capsys.readouterr().err


def test_only_progress_forgets_starts_without_progress(tmp_path: Path) -> None:
    """SLURM restarts a job by itself now and then; what went nowhere before has still gone nowhere."""
    folder = start_folder(tmp_path, "9", 0)
    keep(folder / "start.json", StartRecord("9", 0, ["n1"], 1, time.time() - 20, 0))
    keep(folder / "verdict.json", Verdict("requeue", "rank 0 hung", 75, time.time() - 15, num_idle=2))
    keep(start_folder(tmp_path, "9", 1) / "start.json", StartRecord("9", 1, ["n1"], 1, time.time() - 10, 0))
    third = supervisor(tmp_path, "9", restart=2)
    third.begin()
    assert verdict_on(tmp_path, "9", 1).num_idle == 2
    assert third.conclude(ended(-9)) == 75
    assert verdict_on(tmp_path, "9", 2).num_idle == 3


def test_only_what_this_job_has_met_is_avoided(tmp_path: Path) -> None:
    """A folder may be months old, and its nodes mended."""
    for job_id, host in (("3", "old"), ("9", "bad")):
        folder = start_folder(tmp_path, job_id, 0)
        keep(folder / "start.json", StartRecord(job_id, 0, [host], 1, time.time() - 20, 0))
        keep(folder / "verdict.json", Verdict("leave", "node failure", 0, time.time() - 15, [host]))
    begun = supervisor(tmp_path, "9", restart=1)
    begun.begin()
    begun.conclude(ended(-9))
    assert (start_folder(tmp_path, "9", 1) / "requeue").read_text() == "bad,n1\n"


def test_an_ending_that_is_torn_counts_as_not_told(tmp_path: Path) -> None:
    begun = supervisor(tmp_path, "9")
    begun.begin()
    ending_path(start_folder(tmp_path, "9", 0), 1).write_text('{"rank": 1, "ho')
    assert begun.conclude(ended(0)) == 0


def test_a_submission_that_cannot_be_recorded_is_no_half_line(tmp_path: Path) -> None:
    first = Submission("1", 0.0, "slurm", 1)
    record_submission(tmp_path, first)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / JOBS_FILE).stat().st_size + 10, resource.RLIM_INFINITY))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(PomscaleError, match=r"jobs\.jsonl.*make room"):
            record_submission(tmp_path, Submission("2", 0.0, "slurm", 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, before)
    third = Submission("3", 0.0, "slurm", 1)
    record_submission(tmp_path, third)
    assert read_submissions(tmp_path) == [replace(one, job_folder=str(tmp_path)) for one in (first, third)]


def test_what_takes_its_node_with_it_each_time_comes_to_an_end(tmp_path: Path) -> None:
    """SLURM starts a job again by itself when a node fails, and nobody is left to give a verdict."""
    for restart in range(4):
        assert (of_a_run(tmp_path, restart).begin() is None) == (restart == 0)
    with pytest.raises(PomscaleError, match=r"4 starts in a row made no progress.*runs resume"):
        of_a_run(tmp_path, 4).begin()
    assert verdict_on(tmp_path, "7", 4).action == "fail"
    # Whoever submits it again has seen to something.
    assert of_a_run(tmp_path, 0, job_id="8").begin() is not None


def of_a_run(job_folder: Path, restart: int, job_id: str = "7") -> Supervisor:
    made = supervisor(job_folder, job_id, restart=restart)
    made._spec = replace(made._spec, is_run=True, max_idle_requeues=3)
    return made
