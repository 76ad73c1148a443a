"""Guard of a rank: a process that starts the rank's process, keeps its output and records how it ended.

    python -m launch.guard JOB_FOLDER      in every task of srun, or in every process that torchrun starts

A process that is killed cannot record that itself, and launchers obscure exit codes; the guard sees both. The guard of
rank 0 is also the supervisor of the job (launch.node.supervisor). It imports no torch, so that it starts at once and
needs little memory.
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
from launch.node.supervisor import ENDED_BY_SUPERVISOR, GRACE_S, Supervisor
from launch.node.verdict import EXIT_STOPPED
from launch.record.job import Ending, JobSpec, ending_path, keep, log_path, read_submissions, start_folder
from launch.record.result import why_not_to_begin
from pomscale.base.console import warn
from pomscale.base.errors import PomscaleError
from pomscale.base.files import make_folder
from pomscale.base.hosts import name_problem
from pomscale.runs.layout import CODE_FOLDER, END_FILE, JOB_FILE
from pomscale.runs.ledger import RESTARTED_BECAUSE, SUBMITTED

_LOOK_EVERY_S = 0.2
_LOOK_FOR_END_EVERY_S = 2.0  # every rank looks into the shared file system
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_TAIL_BYTES = 8192
_PATIENCE_S = 140.0  # with the record of a job before this one: NFS may take a minute to show it


def guard(spec: JobSpec, identity: RankIdentity) -> int:
    """Run the commands of the job as one rank. Return the exit code that this task should have.

    For every rank but the first it is 0, whatever happened to the rank's process: after any other code srun would kill
    the other ranks before their endings are recorded. For rank 0 it is the exit code of the job.
    """
    forwarding = SignalForwarder()
    job_folder = Path(spec.job_folder)
    folder = start_folder(job_folder, identity.job_id, identity.restart)
    supervisor = Supervisor(spec, identity, folder, forwarding) if identity.rank == 0 else None
    restarted_because = supervisor.begin() if supervisor is not None else None
    if identity.on_slurm and identity.restart == 0:
        reason = why_not_to_begin(spec.wait_for, _PATIENCE_S)
        if reason:
            return supervisor.refuse(reason) if supervisor is not None else 0
    ending = _Rank(spec, identity, forwarding, supervisor, restarted_because).run()
    try:
        keep(ending_path(folder, identity.rank), ending)
    except PomscaleError as problem:  # e.g. a full disk: rank 0 will report that this rank has left no ending
        warn(str(problem))
        if supervisor is None and not spec.is_run:
            return problem.exit_code  # rank 0 would wait forever, as the ranks of such a job end independently
    if supervisor is None:
        return 0
    return supervisor.conclude(ending)


class _Rank:
    """The process of a rank, from its first command to its last."""

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
        self._end_requested_s: float | None = None

    def run(self) -> Ending:
        started_unix_s = time.time()
        num_kills = num_out_of_memory_kills()
        make_folder(self._log.parent)
        with _opened(self._log) as log:
            begin = log.seek(0, os.SEEK_END)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            identity = self._identity
            _say(log.fileno(), f"===== start {identity.job_id}-{identity.restart} on {identity.host}, {now} =====")
            pid, returncode = self._run_commands(log.fileno())
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

    def _run_commands(self, log: int) -> tuple[int, int]:
        """Return (process number, return code) of the last command that was run."""
        first = self._identity.environment.get("MASTER_ADDR")
        if first is not None and (problem := name_problem(first)) is not None:
            _say(log, f"error: {problem}")  # it would look for the other ranks for a long time
            return 0, 1
        pid, returncode = 0, 0
        for words in self._spec.commands:
            if self._forwarding.first is not None:
                return pid, EXIT_STOPPED  # asked to stop before it began: nothing is lost
            pid, returncode = self._run_command(words, log)
            if returncode:
                break
        return pid, returncode

    def _run_command(self, words: list[str], log: int) -> tuple[int, int]:
        """Return (process number, return code)."""
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
        except OSError as problem:  # the folder that it was launched from is gone, or not visible on this node
            _say(log, f"error: {identity.host} cannot start it in {self._spec.cwd}: {problem}")
            return 0, 1
        self._forwarding.send = partial(_forward, child)
        if self._forwarding.first is not None:  # the signal came after the check in run(), before the line above
            child.send_signal(signal.Signals[self._forwarding.first])
        while child.poll() is None:
            if self._supervisor is not None:
                self._supervisor.poll(child)
            else:
                self._end_if_requested(child)
            time.sleep(_LOOK_EVERY_S)
        self._forwarding.send = None
        return child.pid, child.returncode

    def _end_if_requested(self, child: subprocess.Popen[bytes]) -> None:
        """End the process if the supervisor asks for it; with NCCL it would wait for a rank that is gone."""
        now_s = time.monotonic()
        if self._end_requested_s is not None:
            if now_s - self._end_requested_s > GRACE_S:
                self._forwarding.first = self._forwarding.first or ENDED_BY_SUPERVISOR
                child.kill()
        elif now_s - self._looked_s > _LOOK_FOR_END_EVERY_S:
            self._looked_s = now_s
            if os.path.exists(self._start_folder / END_FILE):  # Path.exists raises on errors of the file system
                self._end_requested_s = now_s


def _opened(log: Path) -> FileIO:
    try:
        return log.open("ab", buffering=0)
    except OSError as error:
        raise PomscaleError(f"{log} cannot be written: {error}; make room and launch again") from error


def _say(log: int, line: str) -> None:
    """Write a line into the log. A full disk loses the line, but does not end the job."""
    try:
        os.write(log, f"{line}\n".encode())
    except OSError as problem:
        warn(f"the log cannot be written ({problem}): {line}")


def _forward(child: subprocess.Popen[bytes], number: int) -> None:
    if child.poll() is None:
        child.send_signal(number)


def _environment(spec: JobSpec, identity: RankIdentity) -> dict[str, str]:
    """Return the variables of the rank; those of the job script (modules, NCCL, the profile's) are set already."""
    environment = {**spec.environment, **identity.environment}
    code = Path(spec.job_folder) / CODE_FOLDER
    if code.is_dir():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
        environment["PYTHONSAFEPATH"] = "1"  # else a pomscale/ in the working folder would take precedence
    by_id = {submission.job_id: submission for submission in read_submissions(Path(spec.job_folder))}
    submission = by_id.get(identity.job_id) or by_id.get(identity.job_id.split("_")[0])
    if submission is not None:
        environment[SUBMITTED] = str(submission.submitted_unix_s)
    return environment


def _die_with_parent() -> None:
    """Let this child die with its guard: a rank without a guard would run unnoticed."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _last_line(log: Path, begin: int) -> str:
    """Return the line that says why a process ended: the last error of pomscale, or the last line of a traceback."""
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
