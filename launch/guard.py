"""Beside every rank, outside of it: starts its process, keeps what it prints, and tells how it ended.

    python -m launch.guard HOME      in every task of srun, or in every process that torchrun starts

A process that is killed cannot say so, and launchers blur exit codes; its guard saw it. The guard of rank 0 is also the
supervisor of the job (supervisor.py). Python and SLURM only, no torch: it starts at once and hardly takes memory.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import partial
from io import FileIO
from pathlib import Path

from launch.node.identity import RankIdentity
from launch.node.oom import num_out_of_memory_kills
from launch.node.signals import SignalForwarder
from launch.node.supervisor import ENDED_BY_SUPERVISOR, LAST_WORDS_S, Supervisor
from launch.node.verdict import EXIT_STOPPED
from launch.record.job import (
    CODE,
    END_FILE,
    JOB_FILE,
    Ending,
    JobSpec,
    ending_path,
    keep,
    log_path,
    read_submissions,
    start_folder,
)
from pomscale.base.console import warn
from pomscale.base.errors import PomscaleError
from pomscale.base.files import make_folder
from pomscale.runs.ledger import RESTARTED_BECAUSE, SUBMITTED

_LOOK_EVERY_S = 0.2
_OBEY_EVERY_S = 2.0  # a look into the shared file system, by every rank
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_TAIL_BYTES = 8192


def guard(spec: JobSpec, identity: RankIdentity) -> int:
    """Run the commands of the job as one rank. Returns the exit code that this task should have.

    That is 0 for every rank but the first, whatever happened to its process: srun would kill all others for another
    one before they have told how they ended. Rank 0 gives the exit code of the job.
    """
    forwarding = SignalForwarder()
    job_folder = Path(spec.job_folder)
    folder = start_folder(job_folder, identity.job_id, identity.restart)
    supervisor = Supervisor(spec, identity, folder, forwarding) if identity.rank == 0 else None
    restarted_because = supervisor.begin() if supervisor is not None else None
    ending = _Rank(spec, identity, forwarding, supervisor, restarted_because).run()
    try:
        keep(ending_path(folder, identity.rank), ending)
    except PomscaleError as problem:  # a full disk: rank 0 will say that nothing was heard of this one
        warn(str(problem))
        if supervisor is None and not spec.is_run:
            return problem.exit_code  # or it would wait for good, as ranks of such a job may take as long as they like
    if supervisor is None:
        return 0
    return supervisor.conclude(ending)


class _Rank:
    def __init__(
        self,
        spec: JobSpec,
        identity: RankIdentity,
        forwarding: SignalForwarder,
        supervisor: Supervisor | None,
        restarted_because: str | None,
    ) -> None:
        self._spec = spec
        self._restarted_because = restarted_because
        self._identity = identity
        self._forwarding = forwarding
        self._supervisor = supervisor
        self._log = log_path(Path(spec.job_folder), identity.array_task * spec.num_ranks + identity.rank)
        self._start_folder = start_folder(Path(spec.job_folder), identity.job_id, identity.restart)
        self._looked_s = 0.0
        self._told_s: float | None = None

    def run(self) -> Ending:
        started_unix_s = time.time()
        num_kills = num_out_of_memory_kills()
        pid, returncode = 0, 0
        make_folder(self._log.parent)
        with _opened(self._log) as log:
            begin = log.seek(0, os.SEEK_END)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            identity = self._identity
            _say(log.fileno(), f"===== start {identity.job_id}-{identity.restart} on {identity.host}, {now} =====")
            for words in self._spec.commands:
                if self._forwarding.first is not None:
                    returncode = EXIT_STOPPED  # told to end before it began: nothing is lost
                    break
                pid, returncode = self._run_command(words, log.fileno())
                if returncode:
                    break
        return Ending(
            self._identity.rank,
            self._identity.host,
            pid,
            started_unix_s,
            time.time(),
            returncode,
            out_of_memory=returncode < 0 and num_out_of_memory_kills() > num_kills,
            ended_by=self._forwarding.first,
            last_line=_last_line(self._log, begin) if returncode not in (0, EXIT_STOPPED) else "",
            log=str(self._log),
        )

    def _run_command(self, words: list[str], log: int) -> tuple[int, int]:
        """(process, how it ended)."""
        identity = self._identity
        restarted = {} if self._restarted_because is None else {RESTARTED_BECAUSE: self._restarted_because}
        _say(log, f"$ pomscale {shlex.join(words)}")
        try:
            child = subprocess.Popen(
                [sys.executable, "-u", "-m", "pomscale", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._spec.cwd,
                env=os.environ | _environment(self._spec, identity) | restarted,
                process_group=0,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 (one thread)
            )
        except OSError as problem:  # the folder that it was launched from has gone, or this node does not see it
            _say(log, f"error: {identity.host} cannot start it in {self._spec.cwd}: {problem}")
            return 0, 1
        self._forwarding.send = partial(_hand_on, child)
        if self._forwarding.first is not None:  # it came between the look above and the line before
            child.send_signal(signal.Signals[self._forwarding.first])
        while child.poll() is None:
            if self._supervisor is not None:
                self._supervisor.poll(child)
            else:
                self._obey(child)
            time.sleep(_LOOK_EVERY_S)
        self._forwarding.send = None
        return child.pid, child.returncode

    def _obey(self, child: subprocess.Popen[bytes]) -> None:
        """End the process if the supervisor says so; with NCCL it would wait for the rank that has gone."""
        now_s = time.monotonic()
        if self._told_s is not None:
            if now_s - self._told_s > LAST_WORDS_S:
                self._forwarding.first = self._forwarding.first or ENDED_BY_SUPERVISOR
                child.kill()
        elif now_s - self._looked_s > _OBEY_EVERY_S:
            self._looked_s = now_s
            if os.path.exists(self._start_folder / END_FILE):  # Path.exists raises where a file system stutters
                self._told_s = now_s


def _opened(log: Path) -> FileIO:
    try:
        return log.open("ab", buffering=0)
    except OSError as error:
        raise PomscaleError(f"{log} cannot be written: {error}; make room and launch again") from error


def _say(log: int, line: str) -> None:
    """A full disk costs a line, not the job."""
    try:
        os.write(log, f"{line}\n".encode())
    except OSError as problem:
        warn(f"the log cannot be written ({problem}): {line}")


def _hand_on(child: subprocess.Popen[bytes], number: int) -> None:
    if child.poll() is None:
        child.send_signal(number)


def _environment(spec: JobSpec, identity: RankIdentity) -> dict[str, str]:
    """Of the rank. Variables of the job script (modules, NCCL, the profile's) are there already."""
    environment = {**spec.environment, **identity.environment}
    code = Path(spec.job_folder) / CODE
    if code.is_dir():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
        environment["PYTHONSAFEPATH"] = "1"  # or the working folder's own pomscale would come first
    submitted = {submission.job_id: submission for submission in read_submissions(Path(spec.job_folder))}
    submission = submitted.get(identity.job_id) or submitted.get(identity.job_id.split("_")[0])
    if submission is not None:
        environment[SUBMITTED] = str(submission.submitted_unix_s)
    return environment


def _die_with_parent() -> None:
    """In the child: a guard that is killed takes its rank with it, or that would go on unseen."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _last_line(log: Path, begin: int) -> str:
    """The line that says why: the last error of pomscale, or of a traceback."""
    with log.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(begin, size - _TAIL_BYTES))
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith("error: ") or line.partition("] ")[2].startswith("error: "):
            return line.partition("error: ")[2]
    return lines[-1][:500] if lines else ""


def main() -> None:
    job_folder = Path(sys.argv[1]).resolve()
    try:
        spec = JobSpec.read(job_folder / JOB_FILE)
        code = guard(spec, RankIdentity.here(spec))
    except PomscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
