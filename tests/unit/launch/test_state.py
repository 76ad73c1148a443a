"""What a home and SLURM together say of a run: one word, and why."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch.record.job import Action, JobSpec, StartRecord, Submission, Verdict, keep, start_folder
from launch.scheduler.slurm import JobState
from launch.status.facts import read_facts
from launch.status.overview import status
from launch.status.runs import summarize
from launch.status.state import LIVE, State, state_of
from launch.submission.submit import record_submission
from pomscale.base.jsonl import JsonLines
from pomscale.monitoring.sinks import JsonlSink
from pomscale.runs import starts
from pomscale.runs.layout import JOB_FILE, JOBS_FILE
from pomscale.runs.ledger import Ledger
from pomscale.runs.outcome import write_outcome

LOCAL = "99999999"  # above any number that a process can have


def number_of_no_process() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


class JobFolder:
    """Writes what the parts of a job write, at moments given in seconds from now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now_s = time.time()

    def submitted(self, at_s: float, job_id: str = "12", scheduler: str = "slurm", num_tasks: int = 1) -> JobFolder:
        keep(self.folder / JOB_FILE, JobSpec(str(self.folder), "x", [["train", "r.yaml"]], "/", is_run=num_tasks == 1))
        file = JsonLines(self.folder / JOBS_FILE)
        file.append(asdict(Submission(job_id, self.now_s + at_s, scheduler, 1, num_tasks)))  # type: ignore[arg-type]
        file.close()
        return self

    def began(self, at_s: float, job_id: str = "12", restart: int = 0, newest_generation: int = 0) -> JobFolder:
        hosts = ["n1", "n2"] if job_id != LOCAL else [socket.gethostname()]
        start = StartRecord(job_id, restart, hosts, 1, self.now_s + at_s, newest_generation)
        keep(start_folder(self.folder, job_id, restart) / "start.json", start)
        return self

    def judged(
        self, action: Action, at_s: float, reason: str = "why", job_id: str = "12", restart: int = 0
    ) -> JobFolder:
        verdict = Verdict(action, reason, 0, self.now_s + at_s, log="logs/rank-00000.log")
        keep(start_folder(self.folder, job_id, restart) / "verdict.json", verdict)
        return self

    def claimed(self, at_s: float, *, lives: bool | None, job_id: str | None = "12") -> JobFolder:
        """lives: None = on a host that cannot be seen from here."""
        number = starts.Start.claim(self.folder).number
        path = self.folder / "generations" / f"{number:06d}"
        claim = json.loads(path.read_text()) | {"slurm_job_id": job_id}
        if not lives:  # a claim that was not made by this process, now
            moment = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(self.now_s + at_s))
            claim |= {"time": moment, "pid": number_of_no_process()}
        if lives is None:
            claim["host"] = "elsewhere"
        path.write_text(json.dumps(claim))
        return self

    def logged(self, at_s: float, start: int = 1) -> JobFolder:
        sink = JsonlSink(self.folder, start)
        sink.log(100, {"train/loss": 1.0})
        sink.close()
        path = self.folder / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[-1]["time_unix_s"] = self.now_s + at_s
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self

    def asked_to_stop(self) -> JobFolder:
        ledger = Ledger(self.folder, 1, 0)
        ledger.event("stop_requested", 100, signal="SIGUSR2")
        ledger.close()
        return self

    def ended(self, state: str, start: int = 1, reason: str = "") -> JobFolder:
        write_outcome(self.folder, start, 0, state, samples=100, reason=reason)
        return self

    def state(self, jobs: dict[str, JobState] | None = None) -> State:
        return state_of(read_facts(self.folder), jobs, time.time())


@pytest.fixture
def job_folder(tmp_path: Path) -> JobFolder:
    return JobFolder(tmp_path)


def slurm_says(state: str, reason: str = "", restarts: int = 0) -> dict[str, JobState]:
    return {"12": JobState("12", state, reason, [], 0.0, restarts)}


def on_slurm(job_folder: JobFolder, *, logged: bool = True) -> JobFolder:
    """A run in its job, on nodes that cannot be seen."""
    job_folder.submitted(-100).began(-90).claimed(-80, lives=None)
    return job_folder.logged(-5) if logged else job_folder


def by_hand(job_folder: JobFolder, *, lives: bool | None = True) -> JobFolder:
    return job_folder.claimed(-80, lives=lives, job_id=None).logged(-5)


ALONE: dict[str, tuple[Callable[[JobFolder], JobFolder], str]] = {
    "a run by hand": (by_hand, "running"),
    "one that has not logged": (lambda job_folder: job_folder.claimed(-80, lives=True, job_id=None), "starting"),
    "one that saves before it stops": (lambda job_folder: by_hand(job_folder).asked_to_stop(), "stopping"),
    "one that saves, on another host": (lambda job_folder: by_hand(job_folder, lives=None).asked_to_stop(), "stopping"),
    "one that was killed": (lambda job_folder: by_hand(job_folder, lives=False), "killed"),
    "on another host": (lambda job_folder: by_hand(job_folder, lives=None), "running"),
    "on another host, silent for a day": (
        lambda job_folder: job_folder.claimed(-90000, lives=None, job_id=None).logged(-86400),
        "unknown",
    ),
    "on another host, silent for less than its rows are apart": (
        lambda job_folder: job_folder.claimed(-9000, lives=None, job_id=None).logged(-5420).logged(-1820).logged(-1800),
        "running",
    ),
    "finished": (lambda job_folder: by_hand(job_folder, lives=False).ended("finished"), "finished"),
    "stopped": (lambda job_folder: by_hand(job_folder, lives=False).ended("stopped"), "stopped"),
    "stopped at once": (lambda job_folder: by_hand(job_folder, lives=False).ended("quit"), "stopped"),
    "failed": (lambda job_folder: by_hand(job_folder, lives=False).ended("failed"), "failed"),
    "hung": (lambda job_folder: by_hand(job_folder, lives=False).ended("hung"), "failed"),
    "started again after a failure": (
        lambda job_folder: by_hand(job_folder, lives=False).ended("failed").claimed(0, lives=True, job_id=None),
        "starting",
    ),
    "submitted": (lambda job_folder: job_folder.submitted(-5), "queued"),
    "begun by its guard": (lambda job_folder: job_folder.submitted(-9).began(-5), "starting"),
    "in its job": (on_slurm, "running"),
    "in its job, compiling": (lambda job_folder: on_slurm(job_folder, logged=False), "starting"),
    "about to be judged": (lambda job_folder: on_slurm(job_folder).ended("stopped"), "stopping"),
    "judged: requeue": (lambda job_folder: on_slurm(job_folder).ended("stopped").judged("requeue", -1), "requeued"),
    "judged: fail": (lambda job_folder: on_slurm(job_folder).ended("failed").judged("fail", -1), "failed"),
    "judged: done": (lambda job_folder: on_slurm(job_folder).judged("done", -1), "finished"),
    "started again by SLURM": (
        lambda job_folder: on_slurm(job_folder).judged("requeue", -4).began(-3, restart=1, newest_generation=1),
        "starting",
    ),
    "submitted again after a failure": (
        lambda job_folder: on_slurm(job_folder).judged("fail", -4).submitted(-2, "13"),
        "queued",
    ),
    "by hand after its job": (
        lambda job_folder: on_slurm(job_folder).judged("fail", -4).claimed(0, lives=True, job_id=None),
        "starting",
    ),
    "a local job that is gone": (
        lambda job_folder: job_folder.submitted(-100, LOCAL, "local").began(-90, LOCAL).claimed(-80, lives=False),
        "killed",
    ),
    "a local job that was told to end": (
        lambda job_folder: (
            job_folder.submitted(-100, LOCAL, "local").began(-90, LOCAL).judged("requeue", -5, job_id=LOCAL)
        ),
        "stopped",
    ),
    "a local job that was refused before it began": (
        lambda job_folder: job_folder.submitted(-100, LOCAL, "local").judged("fail", -5, job_id=LOCAL),
        "failed",
    ),
    "nothing but a recipe": (lambda job_folder: job_folder, "unknown"),
}


@pytest.mark.parametrize("case", ALONE)
def test_without_slurm(case: str, job_folder: JobFolder) -> None:
    make, word = ALONE[case]
    assert make(job_folder).state().word == word


WITH_SLURM: dict[str, tuple[Callable[[JobFolder], JobFolder], dict[str, JobState], str]] = {
    "waits": (lambda job_folder: job_folder.submitted(-5), slurm_says("PENDING", "Resources"), "queued"),
    "waits again": (
        lambda job_folder: on_slurm(job_folder).judged("requeue", -1),
        slurm_says("PENDING", "BeginTime", 1),
        "requeued",
    ),
    "waits again, nobody judged": (on_slurm, slurm_says("PENDING", "", 1), "requeued"),
    "begins": (lambda job_folder: job_folder.submitted(-5), slurm_says("RUNNING"), "starting"),
    "begins again": (
        lambda job_folder: on_slurm(job_folder).judged("requeue", -1),
        slurm_says("RUNNING", restarts=1),
        "starting",
    ),
    "is about to be requeued": (
        lambda job_folder: on_slurm(job_folder).judged("requeue", -1),
        slurm_says("RUNNING"),
        "stopping",
    ),
    "runs": (on_slurm, slurm_says("RUNNING"), "running"),
    "runs, silent for a day": (
        lambda job_folder: job_folder.submitted(-99000).began(-98000).claimed(-97000, lives=None).logged(-90000),
        slurm_says("RUNNING"),
        "running",
    ),
    "is in a state of another version": (on_slurm, slurm_says("EXPEDITING"), "running"),
    "has not begun, in a state of another version": (
        lambda job_folder: job_folder.submitted(-5),
        slurm_says("EXPEDITING"),
        "starting",
    ),
    "is ending": (on_slurm, slurm_says("COMPLETING"), "stopping"),
    "was cancelled": (on_slurm, slurm_says("CANCELLED"), "cancelled"),
    "was cancelled before it began": (
        lambda job_folder: job_folder.submitted(-5),
        slurm_says("CANCELLED"),
        "cancelled",
    ),
    "ran out of time": (on_slurm, slurm_says("TIMEOUT"), "timeout"),
    "lost its node for good": (on_slurm, slurm_says("NODE_FAIL"), "killed"),
    "failed without a word": (on_slurm, slurm_says("FAILED"), "failed"),
    "ended well, its guard says": (
        lambda job_folder: on_slurm(job_folder).judged("done", -1),
        slurm_says("COMPLETED"),
        "finished",
    ),
    "ended well, but not the run": (on_slurm, slurm_says("COMPLETED"), "stopped"),
    "is forgotten, never began": (lambda job_folder: job_folder.submitted(-5), {}, "unknown"),
    "is forgotten, ended without a word": (on_slurm, {}, "killed"),
    "is forgotten, saved": (lambda job_folder: on_slurm(job_folder).judged("leave", -1), {}, "stopped"),
    "finished long ago": (
        lambda job_folder: on_slurm(job_folder).ended("finished"),
        slurm_says("CANCELLED"),
        "finished",
    ),
    "of somebody's own script": (
        lambda job_folder: job_folder.claimed(-80, lives=None, job_id="12").logged(-5),
        slurm_says("PENDING", restarts=1),
        "queued",
    ),
}


@pytest.mark.parametrize("case", WITH_SLURM)
def test_with_slurm(case: str, job_folder: JobFolder) -> None:
    make, jobs, word = WITH_SLURM[case]
    assert make(job_folder).state(jobs).word == word


def test_the_reason_is_the_verdict(job_folder: JobFolder) -> None:
    on_slurm(job_folder).judged("fail", -1, "rank 3: ValueError: no such thing")
    assert job_folder.state(slurm_says("FAILED")) == State(
        "failed", "rank 3: ValueError: no such thing", str(job_folder.folder / "logs/rank-00000.log")
    )


def test_why_it_waits_and_why_it_waits_again(job_folder: JobFolder) -> None:
    on_slurm(job_folder).judged("requeue", -1, "stopped on request (USR2), saved")
    assert (
        job_folder.state(slurm_says("PENDING", "Priority", 1)).reason
        == "stopped on request (USR2), saved; waits: Priority"
    )


def refused(job_folder: JobFolder, job_id: str = "12") -> JobFolder:
    """It should start again, and SLURM does not let it."""
    on_slurm(job_folder).judged("requeue", -1, "stopped on request (SIGUSR2), saved", job_id=job_id)
    words = "Requested operation is presently disabled for job 12\n"
    (start_folder(job_folder.folder, job_id, 0) / "refused").write_text(words)
    return job_folder


@pytest.mark.parametrize("jobs", [slurm_says("FAILED", "NonZeroExitCode"), {}], ids=["just now", "long ago"])
def test_a_requeue_that_slurm_refuses_is_a_stop_with_slurms_words(
    job_folder: JobFolder, jobs: dict[str, JobState], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = refused(job_folder).state(jobs)
    assert state.word == "stopped"
    assert state.reason == (
        "stopped on request (SIGUSR2), saved; SLURM does not start it again "
        "(Requested operation is presently disabled for job 12): `pomscale runs resume` does"
    )
    monkeypatch.setenv("PATH", "")
    assert "SLURM refused it: Requested operation" in status(job_folder.folder)


def test_a_requeue_that_never_came_is_a_stop(job_folder: JobFolder) -> None:
    """The job script was killed before it could ask."""
    on_slurm(job_folder).judged("requeue", -1, "rank 1 on n2 was killed by SIGKILL")
    state = job_folder.state(slurm_says("FAILED"))
    assert state.word == "stopped"
    assert state.reason.endswith("SLURM does not start it again (its job is FAILED): `pomscale runs resume` does")
    assert job_folder.state(slurm_says("CANCELLED")).word == "cancelled"
    assert job_folder.state(slurm_says("TIMEOUT")).word == "timeout"


def test_a_task_that_slurm_does_not_requeue_is_the_reason_of_its_array(job_folder: JobFolder) -> None:
    job_folder.submitted(-100, num_tasks=2).began(-90, "12_0").judged("done", -50, job_id="12_0")
    job_folder.began(-90, "12_1").judged("requeue", -50, "stopped on request (SIGUSR2), saved", job_id="12_1")
    ended = {"12_0": "COMPLETED", "12_1": "FAILED"}
    state = job_folder.state({task: JobState(task, word, "", [], 0.0, 0) for task, word in ended.items()})
    assert state.word == "stopped"
    assert "1 stopped, 1 finished; stopped on request (SIGUSR2), saved; SLURM does not start it again" in state.reason


def test_a_stale_verdict_of_a_job_with_the_same_number_does_not_count(job_folder: JobFolder) -> None:
    job_folder.submitted(-9).began(-5).judged("fail", -500)
    assert job_folder.state().word == "starting"


def test_an_array_is_as_its_foremost_task(job_folder: JobFolder) -> None:
    job_folder.submitted(-100, num_tasks=3).began(-90, "12_0").judged("done", -50, job_id="12_0")
    job_folder.began(-90, "12_1").judged("fail", -50, "rank 1 on n1: no disk", job_id="12_1")
    assert job_folder.state().word == "queued"  # the third, as far as the folder tells
    job_folder.began(-40, "12_2")
    assert job_folder.state().word == "running"
    jobs = {
        task: JobState(task, state, "", [], 0.0, 0)
        for task, state in (("12_0", "COMPLETED"), ("12_1", "FAILED"), ("12_2", "RUNNING"))
    }
    assert job_folder.state(jobs).word == "running"
    jobs["12_2"] = replace(jobs["12_2"], state="COMPLETED")
    job_folder.judged("done", -1, job_id="12_2")
    assert job_folder.state(jobs) == State(
        "failed",
        "tasks: 1 failed, 2 finished; rank 1 on n1: no disk",
        str(job_folder.folder / "logs/rank-00000.log"),
    )


def test_tasks_that_slurm_has_forgotten_count_as_their_guards_say(job_folder: JobFolder) -> None:
    job_folder.submitted(-900, num_tasks=4).began(-890, "12_0").judged("done", -800, job_id="12_0")
    job_folder.began(-890, "12_1").judged("fail", -800, "rank 1 on n1: no disk", job_id="12_1")
    job_folder.began(-890, "12_2").began(-90, "12_3")
    jobs = {"12_3": JobState("12_3", "RUNNING", "", [], 0.0, 0)}
    assert job_folder.state(jobs) == State(
        "running",
        "tasks: 1 running, 1 failed, 1 killed, 1 finished; rank 1 on n1: no disk",
        str(job_folder.folder / "logs/rank-00000.log"),
    )


LAUNCHED_AND_LIVE: dict[str, Callable[[JobFolder], JobFolder]] = {
    "a run by hand": by_hand,
    "on slurm": on_slurm,
    "queued": lambda job_folder: job_folder.submitted(-5),
    "no run": lambda job_folder: job_folder.submitted(-9).began(-5),
    "requeued": lambda job_folder: on_slurm(job_folder).judged("requeue", -1),
    "a local job": lambda job_folder: (
        job_folder.submitted(-0.1, str(os.getpid()), "local").began(0, str(os.getpid())).claimed(0, lives=True)
    ),
}


@pytest.mark.parametrize("case", LAUNCHED_AND_LIVE)
def test_the_jobs_and_processes_of_a_copy_are_those_of_its_original(case: str, job_folder: JobFolder) -> None:
    original = JobFolder(job_folder.folder / "a")
    original.folder.mkdir()
    before = LAUNCHED_AND_LIVE[case](original).state(slurm_says("PENDING")).word
    assert before in LIVE
    copy = JobFolder(Path(shutil.copytree(original.folder, job_folder.folder / "b")))
    state = copy.state(slurm_says("RUNNING"))
    assert state.word == "stopped"
    if before != "requeued":  # there the verdict says why the original has stopped
        assert state.reason == f"a copy of {original.folder}, to which its last job and processes belong"
    assert read_facts(copy.folder).slurm_job is None, "nobody asks SLURM about it, or cancels it"
    assert copy.claimed(0, lives=True, job_id=None).state(slurm_says("RUNNING")).word in LIVE
    assert read_facts(copy.folder).is_by_hand
    assert original.state(slurm_says("PENDING")).word == before


@pytest.mark.parametrize("case", LAUNCHED_AND_LIVE)
def test_a_folder_that_was_moved_keeps_its_job(case: str, job_folder: JobFolder) -> None:
    original = JobFolder(job_folder.folder / "a")
    original.folder.mkdir()
    before = LAUNCHED_AND_LIVE[case](original).state(slurm_says("RUNNING"))
    moved = JobFolder(original.folder.rename(job_folder.folder / "b"))
    assert moved.state(slurm_says("RUNNING")).word == before.word
    original.folder.mkdir()
    another = JobFolder(original.folder).claimed(0, lives=True, job_id="99")  # of the same name
    assert another.state().word == "starting"
    assert moved.state(slurm_says("RUNNING")).word == before.word


@pytest.mark.parametrize("action", ["done", "fail"])
def test_a_copy_of_what_has_ended_has_ended(job_folder: JobFolder, action: Action) -> None:
    original = JobFolder(job_folder.folder / "a")
    original.folder.mkdir()
    on_slurm(original).judged(action, -1)
    copy = JobFolder(Path(shutil.copytree(original.folder, job_folder.folder / "b")))
    state = copy.state({})
    assert state.word == original.state({}).word
    assert state.log == str(copy.folder / "logs/rank-00000.log")


NO_PYTHON = "slurmstepd-n1: error: execve(): /no/such/python: No such file or directory"
OF_SRUN = (
    "srun: error: n1: task 0: Exited with exit code 2\nsrun: launch/slurm: _step_signal: Terminating StepId=12.0\n"
)


def printed(job_folder: JobFolder, name: str, text: str) -> str:
    path = job_folder.folder / "submitit" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("jobs", "word"), [(slurm_says("FAILED"), "failed"), (slurm_says("NODE_FAIL"), "killed"), ({}, "killed")]
)
@pytest.mark.parametrize("began", [False, True])
def test_what_a_rank_without_a_guard_has_printed_is_the_reason(
    job_folder: JobFolder, jobs: dict[str, JobState], word: str, began: bool
) -> None:
    job_folder.submitted(-9)
    if began:  # only on the first node
        job_folder.began(-5)
    printed(job_folder, "12_0_log.out", f"Loading module cuda\n{OF_SRUN}")
    log = printed(job_folder, "12_1_log.out", f"{NO_PYTHON}\n")
    state = job_folder.state(jobs)
    assert (state.word, state.log) == (word, log)
    assert state.reason.endswith(f"; it has printed: {NO_PYTHON}")


def test_words_without_an_error_are_better_than_none(job_folder: JobFolder) -> None:
    log = printed(job_folder.submitted(-9), "12_0_log.out", f"bye\n{OF_SRUN}")
    assert job_folder.state(slurm_says("FAILED")) == State("failed", "SLURM says FAILED; it has printed: bye", log)


def test_words_of_an_earlier_job_say_nothing(job_folder: JobFolder) -> None:
    path = printed(job_folder.submitted(-9).began(-5, restart=1), "12_0_log.out", f"{NO_PYTHON}\n")
    os.utime(path, (job_folder.now_s - 8, job_folder.now_s - 8))
    printed(job_folder, "1_0_log.out", f"{NO_PYTHON}\n")
    assert job_folder.state(slurm_says("FAILED")) == State("failed", "SLURM says FAILED; there is no other record")


def test_the_output_of_a_script_of_ones_own_is_read_where_it_is(job_folder: JobFolder) -> None:
    log = job_folder.folder / "slurm-12.log"
    log.write_text(f"{NO_PYTHON}\n")
    record_submission(job_folder.folder, Submission("12", job_folder.now_s - 9, "slurm", 1, output=str(log)))
    assert job_folder.state(slurm_says("FAILED")).log == str(log)


def test_a_local_job_that_is_gone_has_words_too(job_folder: JobFolder) -> None:
    log = printed(job_folder.submitted(-9, LOCAL, "local"), f"{LOCAL}_0_log.err", "ModuleNotFoundError: no submitit\n")
    state = job_folder.state()
    assert (state.word, state.log) == ("killed", log)
    assert "no submitit" in state.reason


def test_only_what_is_not_settled_is_asked_for(job_folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    on_slurm(job_folder)
    monkeypatch.setenv("PATH", "")
    assert summarize({job_folder.folder: "x"}).problem == "SLURM's commands are not on this machine"
    job_folder.judged("fail", -1)
    assert not summarize({job_folder.folder: "x"}).problem


def test_what_is_no_attempt_is_none(job_folder: JobFolder) -> None:
    on_slurm(job_folder)
    (job_folder.folder / "attempts" / ".nfs00000001").touch()
    assert job_folder.state(slurm_says("RUNNING")).word == "running"


def test_unreadable_files_are_told_and_hide_no_other_run(job_folder: JobFolder, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    JobFolder(broken).submitted(-5).began(-4)
    (broken / "attempts" / "12-0" / "start.json").write_text('{"half": ')
    whole = tmp_path / "whole"
    whole.mkdir()
    by_hand(JobFolder(whole))
    with (whole / "metrics.jsonl").open("a") as file:
        file.write('{"samples": 200, "time_uni\n[1, 2]\nnull\n')
    runs = {run.name: run for run in summarize({broken: "broken", whole: "whole"}).runs}
    assert (runs["whole"].state, runs["whole"].samples) == ("running", 100)
    assert runs["broken"].state == "unknown"
    assert "start.json cannot be read" in runs["broken"].reason
