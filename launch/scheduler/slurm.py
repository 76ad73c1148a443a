"""Commands of SLURM: thin adapters over squeue, sacct, sinfo, scontrol and scancel.

Every failure is a SlurmError with SLURM's own message. On a site without accounting, and only there, jobs that squeue
no longer knows are missing.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from launch.scheduler import environment
from pomscale.base.errors import PomscaleError

_TIMEOUT_S = 60  # SLURM's commands themselves try for 20 s where the controller does not answer
_ENDING_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}

_UNKNOWN_JOB = "Invalid job id specified"
_NO_ACCOUNTING = "accounting storage is disabled"
_BAD_NODE = re.compile(r"down|drain|fail|.*\*")  # *: does not respond

# Columns of squeue, and the widths at which it cuts them off. Lists are asked for again, wider, until they are whole.
_FIELDS = {"JobID": 24, "State": 24, "Reason": 64, "TimeUsed": 24, "RestartCnt": 12}
_LISTS = {"NodeList": 4096, "JobArrayID": 128}

_HOSTS = r"(?:[^,\[\]]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+"  # one host, or several with the same beginning


class SlurmError(PomscaleError):
    """SLURM refused, or did not answer."""


@dataclass(frozen=True)
class JobState:
    """State of a job, or of one task of an array, according to SLURM.

    state: its long name, such as "RUNNING". reason: why it is in this state, "" for none. hosts: where it runs or ran.
    num_restarts: how often it has been requeued; while it is COMPLETING, more than its own SLURM_RESTART_COUNT means
    that it will start again. It is None for a job that only accounting remembers.
    """

    job_id: str
    state: str
    reason: str
    hosts: list[str]
    elapsed_s: float
    num_restarts: int | None


def is_available() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def check_answers() -> None:
    """Raise SlurmError at once if there is no SLURM, or if no controller answers: sbatch would try for a long time."""
    words = ["scontrol", "ping"]
    _, output, complaint = _finished(words)
    if " is UP" not in output:  # of the backup, if there is one
        problem = _failure(words, complaint or output.partition("\n")[0])
        raise SlurmError(f"{problem}. SLURM answers on the login nodes of a cluster; --cluster local needs none")


def job_states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Return the states by id of all jobs that are known, by one call of squeue and one of sacct for older jobs.

    The tasks of an array "12" are listed one by one, as "12_0" and so on. Raises SlurmError if the controller does not
    answer. If only accounting does not answer, there is a warning, and older jobs are missing.
    """
    asked = list(dict.fromkeys(job_ids))
    if not asked:
        return {}
    states = {state.job_id: state for state in _in_queue(asked)}
    # Accounting is asked about every array: squeue may have forgotten its first tasks while the last ones still run.
    if forgotten := [job_id for job_id in asked if job_id not in states]:
        states = {state.job_id: state for state in _in_accounting(forgotten)} | states
    return states


def state_now(job_id: str) -> str:
    """Return the state of one job by a single call of squeue; "" if squeue does not know it (any more)."""
    lines = _squeue([job_id], ["--format=%T"])
    return lines[0] if lines else ""


def has_not_begun(job_id: str) -> bool:
    """Whether a job waits, and of an array every task."""
    return set(_squeue([job_id], ["--format=%T"])) == {"PENDING"}


def requeue(job_id: str) -> None:
    """End the job, if it runs, and start it again. A job that is just being cancelled would return: check before."""
    _run(["scontrol", "requeue", job_id])


def cancel(job_id: str) -> None:
    """End a job. Nothing happens if it has ended, or if SLURM does not know it."""
    _run(["scancel", job_id])


def send_signal(job_id: str, name: str) -> None:
    """Signal every process of a running job's steps, but not the batch script itself. name: without SIG."""
    states = set(_squeue([job_id], ["--format=%T"]))
    if "RUNNING" not in states:  # scancel would try for a minute and a half
        raise SlurmError(f"job {job_id} is {' '.join(states) or 'unknown to squeue'}: only a running job gets a signal")
    _run(["scancel", f"--signal={name}", job_id])


def exclude(job_id: str, hosts: Iterable[str]) -> None:
    """Exclude further hosts for a job that is to start, or to start again. SlurmError for a job that runs."""
    before = _squeue([job_id], ["--format=%x"])
    excluded = dict.fromkeys([*hosts_of(before[0] if before else ""), *hosts])
    _run(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(excluded)}"])


def bad_nodes(hosts: Iterable[str]) -> list[str]:
    """Return the hosts that are down, drained, failing, or do not respond."""
    names = list(dict.fromkeys(hosts))
    if not names:
        return []
    lines = _run(["sinfo", "--noheader", "--Node", f"--nodes={','.join(names)}", "--format=%N %T"]).splitlines()
    bad = {line.split()[0] for line in lines if _BAD_NODE.match(line.split()[1])}
    return [name for name in names if name in bad]


def configuration() -> dict[str, str]:
    """Return SLURM's configuration on this site, by the names of slurm.conf."""
    lines = _run(["scontrol", "show", "config"]).splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def partition(name: str | None) -> dict[str, str]:
    """Return a partition (None: the default one) by SLURM's own names, such as MaxTime; empty if there is none."""
    for line in _run(["scontrol", "show", "partition", "--oneliner"]).splitlines():
        values = _values(line)
        if values.get("PartitionName") == name or (name is None and values.get("Default") == "YES"):
            return values
    return {}


def details(job_id: str) -> dict[str, str]:
    """Return the details of a job that the controller knows, by SLURM's own names, such as Requeue."""
    return _values(_run(["scontrol", "show", "job", job_id, "--oneliner"]))


def _values(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def hosts_of(nodelist: str) -> list[str]:
    """Expand "n[1-2,07],gpu3" to ["n1", "n2", "n07", "gpu3"], like `scontrol show hostnames`, without asking SLURM.

    SlurmError for what is no such list.
    """
    if nodelist and re.fullmatch(f"{_HOSTS}(,{_HOSTS})*", nodelist) is None:
        raise SlurmError(f"{nodelist}: no list of hosts that pomscale can read, such as n[1-2,07],gpu3")
    return [host for part in re.findall(_HOSTS, nodelist) for host in _expanded(part)]


def seconds_of(text: str) -> float | None:
    """Parse a time such as "1-02:03:04", "2:03:04" or "3:04"; None for "UNLIMITED" and the like."""
    if re.fullmatch(r"(\d+-)?(\d+:)*\d+", text) is None:
        return None
    days, _, rest = text.rpartition("-")
    seconds = 0
    for part in rest.split(":"):
        seconds = seconds * 60 + int(part)
    return float(int(days or 0) * 86400 + seconds)


def tasks_of(job_id: str) -> list[str]:
    """Expand squeue's "12_[0-6:3,9%4]", the waiting tasks of an array, to ["12_0", "12_3", "12_6", "12_9"].

    Any other job is its own only task. `squeue --array` does the same, but SLURM 22.05 leaves out the last task of
    every list that has a step.
    """
    array, bracket, indices = job_id.partition("_[")
    if not bracket:
        return [job_id]
    tasks: list[str] = []
    for part in indices.rstrip("]").partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        tasks += [f"{array}_{index}" for index in range(int(first), int(last or first) + 1, int(step or 1))]
    return tasks


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
    for number, state, reason, used, restarts, nodes, tasks in _rows_of_queue(asked):
        # A task of an array also has a job number of its own, which it finds in SLURM_JOB_ID.
        is_asked_by_number = tasks.partition("_")[0] not in asked and number in asked
        why, hosts, elapsed_s = "" if reason == "None" else reason, hosts_of(nodes), seconds_of(used) or 0.0
        for job_id in [number] if is_asked_by_number else tasks_of(tasks):
            yield JobState(job_id, state, why, hosts, elapsed_s, int(restarts))


def _rows_of_queue(asked: list[str]) -> list[list[str]]:
    """Return squeue's values of _FIELDS and _LISTS."""
    lists = _LISTS
    while True:
        # --format, which cuts off nothing, has no field for the number of restarts.
        fields = ",".join(f"{name}:{width}|" for name, width in (_FIELDS | lists).items())
        rows = [[word.strip() for word in line.split("|")[:-1]] for line in _squeue(asked, [f"--Format={fields}"])]
        values = [(name, value) for row in rows for name, value in zip(lists, row[-len(lists) :], strict=True)]
        cut_off = {name for name, value in values if len(value) == lists[name]}
        if not cut_off:
            return rows
        lists = {name: 16 * width if name in cut_off else width for name, width in lists.items()}


def _squeue(job_ids: list[str], options: list[str]) -> list[str]:
    """Return squeue's lines; none for jobs that it does not know."""
    words = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(job_ids)}", *options]
    try:
        return _run(words).splitlines()
    except SlurmError as error:
        if _UNKNOWN_JOB in str(error):  # the message for one unknown job; for several there is none
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
        if "[" in job_id:  # tasks of an array that have not begun; squeue lists them one by one
            continue
        if job_id.partition("_")[0] not in asked and number in asked:
            job_id = number
        hosts = [] if nodes == "None assigned" else hosts_of(nodes)
        why = "" if reason == "None" else reason
        # "CANCELLED by 1000"
        yield JobState(job_id, state.split()[0], why, hosts, float(elapsed), None)


def _run(words: list[str]) -> str:
    """Return the output of one of SLURM's commands. SlurmError, naming it, if it fails or does not answer."""
    code, output, complaint = _finished(words)
    if code != 0:
        raise SlurmError(_failure(words, complaint or output or f"ended with {code}"))
    return output


def _failure(words: list[str], complaint: str) -> str:
    return f"{' '.join(words)}: {' '.join(complaint.split())}"


def _finished(words: list[str]) -> tuple[int, str, str]:
    """Return (exit code, standard output, standard error)."""
    # A supervisor asks while SLURM is ending its job: the signals to all its processes must not end this command.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING_SIGNALS)
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment.for_questions(),
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
