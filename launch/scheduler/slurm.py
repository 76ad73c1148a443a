"""What SLURM is asked and told: thin adapters over squeue, sacct, sinfo, scontrol and scancel.

Every failure is a SlurmError with SLURM's own words. What a site's accounting would remember, a site without accounting
has forgotten: jobs that squeue no longer knows are absent there, and only there.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pomscale.base.errors import PomscaleError

_TIMEOUT_S = 60  # SLURM's commands themselves try for 20 s where the controller does not answer
_ENDING_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
# Defaults that users set for themselves would change what these commands print, or make them ask.
_USER_DEFAULTS = ("SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SCONTROL_")

_UNKNOWN_JOB = "Invalid job id specified"
_NO_ACCOUNTING = "accounting storage is disabled"
_BAD_NODE = re.compile(r"down|drain|fail|.*\*")  # *: does not respond

_FIELDS = {
    "JobID": 24,
    "JobArrayID": 64,
    "State": 24,
    "Reason": 64,
    "NodeList": 8192,
    "TimeUsed": 24,
    "TimeLeft": 24,
    "RestartCnt": 12,
}


class SlurmError(PomscaleError):
    """SLURM refused, or did not answer."""


@dataclass(frozen=True)
class JobState:
    """A job, or one task of an array, as SLURM has it.

    state: its long name, such as "RUNNING". reason: why it is in this state, "" for none. hosts: where it is or was.
    time_left_s: until its limit; None where there is none. num_restarts: how often it has been requeued; while it is
    COMPLETING, more than its own SLURM_RESTART_COUNT means that it will start again. Both are None for a job that only
    accounting remembers.
    """

    job_id: str
    state: str
    reason: str
    hosts: list[str]
    elapsed_s: float
    time_left_s: float | None
    num_restarts: int | None


def is_available() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def check_answers() -> None:
    """Raises SlurmError, at once, where there is no SLURM or no controller answers: sbatch would try for long."""
    words = ["scontrol", "ping"]
    _, output, complaint = _finished(words)
    if " is UP" not in output:  # of the backup, if there is one
        problem = _failure(words, complaint or output.partition("\n")[0])
        raise SlurmError(f"{problem}. SLURM answers on the login nodes of a cluster; --cluster local needs none")


def job_states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """States by id, of all that are known: one call of squeue, and one of sacct for what it has forgotten.

    The tasks of an array "12" come one by one, as "12_0" and so on. Raises SlurmError if the controller does not
    answer. Where only accounting does not, it says so on standard error, and what squeue has forgotten stays unknown.
    """
    asked = list(dict.fromkeys(job_ids))
    if not asked:
        return {}
    states = {state.job_id: state for state in _in_queue(asked)}
    # Of an array whose last tasks still run it may have forgotten the first.
    if forgotten := [job_id for job_id in asked if job_id not in states]:
        states = {state.job_id: state for state in _in_accounting(forgotten)} | states
    return states


def state_now(job_id: str) -> str:
    """Of one job, by a single squeue; "" if that does not know it (any more)."""
    lines = _squeue([job_id], ["--format=%T"])
    return lines[0] if lines else ""


def requeue(job_id: str) -> None:
    """End the job, if it runs, and start it again. Brings back a job that is just being cancelled: look before."""
    _run(["scontrol", "requeue", job_id])


def cancel(job_id: str) -> None:
    """End it. Nothing happens to a job that has ended, or that nobody knows."""
    _run(["scancel", job_id])


def send_signal(job_id: str, name: str) -> None:
    """To every process of a running job's steps, but not to the batch script itself. name: without SIG."""
    states = set(_squeue([job_id], ["--format=%T"]))
    if "RUNNING" not in states:  # scancel would try for a minute and a half
        raise SlurmError(f"job {job_id} is {' '.join(states) or 'unknown to squeue'}: only a running job gets a signal")
    _run(["scancel", f"--signal={name}", job_id])


def exclude(job_id: str, hosts: Iterable[str]) -> None:
    """Keep a job that is to start, or to start again, off these hosts too. SlurmError for one that runs."""
    before = _squeue([job_id], ["--format=%x"])
    excluded = dict.fromkeys([*hosts_of(before[0] if before else ""), *hosts])
    _run(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(excluded)}"])


def bad_nodes(hosts: Iterable[str]) -> list[str]:
    """Those that are down, failing or do not respond, and those that get no new jobs for a reason of their own."""
    names = list(dict.fromkeys(hosts))
    if not names:
        return []
    lines = _run(["sinfo", "--noheader", "--Node", f"--nodes={','.join(names)}", "--format=%N %T"]).splitlines()
    bad = {line.split()[0] for line in lines if _BAD_NODE.match(line.split()[1])}
    return [name for name in names if name in bad]


def configuration() -> dict[str, str]:
    """How SLURM is set up here, by the names of slurm.conf."""
    lines = _run(["scontrol", "show", "config"]).splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def partition(name: str | None) -> dict[str, str]:
    """A partition by SLURM's own names, such as MaxTime; None = the default one. Empty where there is none such."""
    for line in _run(["scontrol", "show", "partition", "--oneliner"]).splitlines():
        values = _values(line)
        if values.get("PartitionName") == name or (name is None and values.get("Default") == "YES"):
            return values
    return {}


def details(job_id: str) -> dict[str, str]:
    """Of a job that the controller knows, by SLURM's own names, such as Requeue."""
    return _values(_run(["scontrol", "show", "job", job_id, "--oneliner"]))


def _values(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def hosts_of(nodelist: str) -> list[str]:
    """ "n[1-2,07],gpu3" -> ["n1", "n2", "n07", "gpu3"], as `scontrol show hostnames` has it, without asking SLURM."""
    return [host for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist) for host in _expanded(part)]


def seconds_of(text: str) -> float | None:
    """ "1-02:03:04", "2:03:04" or "3:04", as SLURM writes times; None for "UNLIMITED" and its like."""
    if re.fullmatch(r"(\d+-)?(\d+:)*\d+", text) is None:
        return None
    days, _, rest = text.rpartition("-")
    seconds = 0
    for part in rest.split(":"):
        seconds = seconds * 60 + int(part)
    return float(int(days or 0) * 86400 + seconds)


def _expanded(name: str) -> Iterator[str]:
    start, bracket, rest = name.partition("[")
    if not bracket:
        yield name
        return
    choices, _, end = rest.partition("]")
    for choice in choices.split(","):
        first, _, last = choice.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for tail in _expanded(end):
                yield f"{start}{number:0{len(first)}d}{tail}"


def _in_queue(asked: list[str]) -> Iterator[JobState]:
    # Not --format, which knows no number of restarts.
    fields = ",".join(f"{name}:{width}|" for name, width in _FIELDS.items())
    for line in _squeue(asked, [f"--Format={fields}"]):
        number, job_id, state, reason, nodes, used, left, restarts = (word.strip() for word in line.split("|")[:-1])
        # A task of an array has a number of its own, by which it knows itself.
        if job_id.partition("_")[0] not in asked and number in asked:
            job_id = number
        why = "" if reason == "None" else reason
        yield JobState(job_id, state, why, hosts_of(nodes), seconds_of(used) or 0.0, seconds_of(left), int(restarts))


def _squeue(job_ids: list[str], options: list[str]) -> list[str]:
    """Lines; none for jobs that it does not know."""
    words = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(job_ids)}", *options]
    try:
        return _run(words).splitlines()
    except SlurmError as error:
        if _UNKNOWN_JOB in str(error):  # so it says of one job, and of several it says nothing
            return []
        raise


def _in_accounting(asked: list[str]) -> Iterator[JobState]:
    fields = "JobID,JobIDRaw,State,Reason,NodeList,ElapsedRaw"
    words = ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={','.join(asked)}", f"--format={fields}"]
    try:
        lines = _run(words).splitlines()
    except SlurmError as error:
        if _NO_ACCOUNTING not in str(error):
            print(f"pomscale: {error}; the state of jobs that ended a while ago is unknown", file=sys.stderr)
        return
    for line in lines:
        job_id, number, state, reason, nodes, elapsed = line.split("|")
        if "[" in job_id:  # the tasks of an array that have not begun: squeue has them one by one
            continue
        if job_id.partition("_")[0] not in asked and number in asked:
            job_id = number
        hosts = [] if nodes == "None assigned" else hosts_of(nodes)
        why = "" if reason == "None" else reason
        # "CANCELLED by 1000"
        yield JobState(job_id, state.split()[0], why, hosts, float(elapsed), None, None)


def _run(words: list[str]) -> str:
    """The output of one of SLURM's commands. Raises SlurmError, naming it, if it fails or gives no answer."""
    code, output, complaint = _finished(words)
    if code != 0:
        raise SlurmError(_failure(words, complaint or output or f"ended with {code}"))
    return output


def _failure(words: list[str], complaint: str) -> str:
    return f"{' '.join(words)}: {' '.join(complaint.split())}"


def _finished(words: list[str]) -> tuple[int, str, str]:
    """(exit code, output, complaints)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_USER_DEFAULTS)}
    # A supervisor asks while SLURM ends its job: what SLURM sends to all processes must not hit the question.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING_SIGNALS)
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        )
    except FileNotFoundError as error:
        raise SlurmError(f"{words[0]}: no such command here; is this a machine of a SLURM cluster?") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    with process:
        try:
            output, complaint = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise SlurmError(_failure(words, f"no answer within {_TIMEOUT_S} s")) from error
    return process.returncode, output, complaint
