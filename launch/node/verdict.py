"""The verdict on one start of a job: how it ended, and what happens next. A pure function: no files, no SLURM.

A run starts again after anything that is not its own fault: a requested stop, a node that failed, a hang, a process
that was killed by a signal. It ends after an error of its own, which would only be repeated, and when several starts in
a row have made no progress.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.record.job import Ending, StartRecord, Verdict

EXIT_SKIPPED, EXIT_STOPPED = 3, 75

# Exceptions that only show that another rank has ended: torch's own classes, and the messages of gloo and NCCL, which
# are plain RuntimeErrors.
_LOST_PEER = re.compile(
    r"Dist(Backend|Network|Store)Error|ProcessGroup|NCCL|gloo|"
    r"Connection (closed|reset|refused|was likely closed)|Broken pipe|[Tt]imed out (waiting|after)|"
    r"[Ss]ocket|remote process exited|recvValue failed|store->get",
)
# Messages of a GPU, its driver or the client of a shared file system that is broken; another node has no such problem.
_BROKEN_NODE = re.compile(
    r"uncorrectable ECC error|GPU is lost|fallen off the bus|busy or unavailable|CUDA error: (hardware|unknown error)|"
    r"system not yet initialized|Stale file handle|Transport endpoint is not connected|transport endpoint shutdown|"
    r"Remote I/O error"
)
_CLOCK_SKEW_S = 2.0
_MOST_CHARACTERS = 500  # of a reason; the log has all of it


@dataclass(frozen=True)
class Evidence:
    """Everything that is known when a start has ended.

    endings: those that the guards of ranks have left. outcomes: those that training has left, by rank. samples: of the
    newest complete checkpoint; None if there is none, or if the job is no run.
    """

    start: StartRecord
    num_ranks: int
    endings: Sequence[Ending]
    outcomes: Mapping[int, Mapping[str, Any]]
    samples: int | None


def decide_verdict(evidence: Evidence, before: Verdict | None, max_idle_requeues: int) -> Verdict:
    """Decide how the start ended and what happens next.

    Args:
        evidence: Everything that is known about the start.
        before: Verdict on the start before this one; None for the first start.
        max_idle_requeues: See ClusterProfile.
    """
    found = _cause(evidence)
    num_idle = _num_idle(evidence, found, before)
    if found.action == "requeue" and num_idle > max_idle_requeues:
        reason = f"{num_idle} starts in a row made no progress; the last one: {found.reason}"
        found = _Cause("fail", reason, 1, found.suspects, found.log)
    return _verdict(evidence, found, num_idle)


@dataclass(frozen=True)
class _Cause:
    action: Any
    reason: str
    exit_code: int = 0
    suspects: tuple[str, ...] = ()
    log: str = ""


def _verdict(evidence: Evidence, cause: _Cause, num_idle: int) -> Verdict:
    return Verdict(
        cause.action,
        " ".join(cause.reason.split())[:_MOST_CHARACTERS],
        cause.exit_code,
        time.time(),
        sorted(set(cause.suspects)),
        num_idle,
        evidence.samples,
        cause.log,
    )


def _num_idle(evidence: Evidence, cause: _Cause, before: Verdict | None) -> int:
    """Return the number of requeues in a row, this one included, that have made no progress."""
    if cause.action != "requeue":
        return 0
    saved = any(ending.returncode == EXIT_STOPPED for ending in evidence.endings)
    if evidence.samples is None and saved:  # an encode has finished the parts that it was working on
        return 0
    since = before.samples if before is not None else None
    if evidence.samples is not None and evidence.samples > (since or 0):
        return 0
    return idle_so_far(before) + 1


def idle_so_far(before: Verdict | None) -> int:
    """Return the number of requeues in a row without progress.

    It is 0 after a failure: a user who submits a failed job again has changed something.
    """
    return 0 if before is None or before.action == "fail" else before.num_idle


def _cause(evidence: Evidence) -> _Cause:
    endings = evidence.endings
    if len(endings) == evidence.num_ranks and all(ending.returncode == 0 for ending in endings):
        return _Cause("done", "finished")
    for find_cause in _CAUSES:
        found = find_cause(evidence)
        if found is not None:
            return found
    return _Cause("fail", "nothing shows how the processes ended", 1)


def _finished(evidence: Evidence) -> _Cause | None:
    """Rank 0 ends a run after all others are past their last step, so that later errors of those do not matter."""
    first = next((ending for ending in evidence.endings if ending.rank == 0), None)
    if evidence.outcomes and evidence.outcomes.get(0, {}).get("state") == "finished" and first and not first.returncode:
        return _Cause("done", "finished")
    return None


def _superseded(evidence: Evidence) -> _Cause | None:
    for ending in evidence.endings:
        if "has taken over" in ending.last_line:  # pomscale.runs.starts.Superseded
            return _Cause("leave", f"{_who(ending)}: {ending.last_line}", 1, log=ending.log)
    return None


def _out_of_memory(evidence: Evidence) -> _Cause | None:
    for ending in evidence.endings:
        if ending.out_of_memory:
            return _Cause(
                "fail",
                f"{_who(ending)} was killed because the host memory ran out; use fewer reader threads or a smaller "
                "data.prefetch, or ask for more memory_gib",
                1,
                log=ending.log,
            )
    return None


def _broken_node(evidence: Evidence) -> _Cause | None:
    """An exception in a process that is caused by a broken machine."""
    logs = {ending.rank: ending.log for ending in evidence.endings}
    for rank, outcome in sorted(evidence.outcomes.items(), key=lambda item: float(item[1]["ended_unix_s"])):
        if outcome["state"] == "failed" and _BROKEN_NODE.search(outcome.get("reason", "")):
            host = evidence.start.host_of(rank)
            return _Cause("requeue", f"{outcome['reason']} (on {host})", EXIT_STOPPED, (host,), logs.get(rank, ""))
    for ending in sorted(evidence.endings, key=lambda ending: ending.ended_unix_s):
        if ending.returncode and ending.rank not in evidence.outcomes and _BROKEN_NODE.search(ending.last_line):
            reason = f"{_who(ending)}: {ending.last_line}"
            return _Cause("requeue", reason, EXIT_STOPPED, (ending.host,), ending.log)
    return None


def _own_fault(evidence: Evidence) -> _Cause | None:
    """The first error that is not about another rank, unless a process was killed before it."""
    errors = []
    logs = {ending.rank: ending.log for ending in evidence.endings}
    for rank, outcome in evidence.outcomes.items():
        if outcome["state"] == "failed" and not _LOST_PEER.search(outcome.get("reason", "")):
            reason = f"{outcome['reason']} (on {evidence.start.host_of(rank)})"
            errors.append((outcome["ended_unix_s"], rank, reason, 1))
    for ending in evidence.endings:
        has_outcome = ending.rank in evidence.outcomes
        if ending.returncode in (1, 2) and not has_outcome and not _LOST_PEER.search(ending.last_line):
            words = ending.last_line or f"exit code {ending.returncode}, without a message"
            errors.append((ending.ended_unix_s, ending.rank, f"{_who(ending)}: {words}", ending.returncode))
    if not errors:
        return None
    ended_unix_s, rank, reason, exit_code = min(errors)
    # SIGABRT does not count: NCCL ends ranks in this way that have lost the failed one.
    others = (ending for ending in evidence.endings if ending.returncode != -signal.SIGABRT)
    killed = [ending.ended_unix_s for ending in others if _by_signal(ending)]
    if killed and min(killed) + _CLOCK_SKEW_S < ended_unix_s:
        return None
    return _Cause("fail", reason, exit_code, log=logs.get(rank, ""))


def _killed(evidence: Evidence) -> _Cause | None:
    """The first process that was killed; those that aborted come last, as NCCL aborts a rank that has lost another."""
    killed = [ending for ending in evidence.endings if _by_signal(ending)]
    if not killed:
        return None
    first = min(killed, key=lambda ending: (ending.returncode == -signal.SIGABRT, ending.ended_unix_s, ending.rank))
    aborted = first.returncode == -signal.SIGABRT
    if aborted and len(evidence.endings) < evidence.num_ranks:
        return None  # a rank without an ending is the cause
    return _Cause(
        "requeue",
        f"{_who(first)} was killed by {_signal_name(-first.returncode)}",
        EXIT_STOPPED,
        () if aborted and len(killed) > 1 else (first.host,),
        first.log,
    )


def _hung(evidence: Evidence) -> _Cause | None:
    for rank, outcome in sorted(evidence.outcomes.items()):
        if outcome["state"] == "hung":
            return _Cause("requeue", f"rank {rank} hung: {outcome.get('reason', '')}", EXIT_STOPPED)
    return None


def _vanished(evidence: Evidence) -> _Cause | None:
    """Ranks that have left no ending, although another rank has failed.

    The node of rank 0 is not suspected, since this is found out on it. If most nodes are silent none is suspected: then
    the file system is slow.
    """
    known = {ending.rank for ending in evidence.endings}
    silent = [rank for rank in range(evidence.num_ranks) if rank not in known]
    ended_well = {0, EXIT_SKIPPED, EXIT_STOPPED}
    if not silent or all(ending.returncode in ended_well for ending in evidence.endings):
        return None
    hosts = sorted({evidence.start.host_of(rank) for rank in silent})
    suspects = [host for host in hosts if host != evidence.start.host_of(0)]
    return _Cause(
        "requeue",
        f"no sign of life from rank {', '.join(map(str, silent[:8]))} on {', '.join(hosts[:8])}",
        EXIT_STOPPED,
        tuple(suspects) if 2 * len(suspects) <= len(evidence.start.hosts) else (),
    )


def _lost_peers(evidence: Evidence) -> _Cause | None:
    """All ranks that failed have lost each other: the cause is the network."""
    for ending in evidence.endings:
        reason = evidence.outcomes.get(ending.rank, {}).get("reason") or ending.last_line
        if ending.returncode in (1, 2) and _LOST_PEER.search(reason):
            return _Cause("requeue", f"{_who(ending)} lost its connection: {reason}", EXIT_STOPPED, log=ending.log)
    return None


def _stopped(evidence: Evidence) -> _Cause | None:
    for ending in evidence.endings:
        if ending.returncode == EXIT_STOPPED:
            by = ending.ended_by or "at another rank"
            return _Cause("requeue", f"stopped on request ({by}), saved", EXIT_STOPPED)
    for ending in evidence.endings:
        if ending.ended_by is not None and ending.returncode != 0:
            return _Cause("requeue", f"ended by {ending.ended_by} before it could save", EXIT_STOPPED)
    return None


def _skipped(evidence: Evidence) -> _Cause | None:
    if any(ending.returncode == EXIT_SKIPPED for ending in evidence.endings):
        return _Cause("done", "done, but some items were skipped; they are listed", EXIT_SKIPPED)
    for ending in evidence.endings:
        if ending.returncode > 0:
            words = ending.last_line or "without a message"
            return _Cause("fail", f"{_who(ending)}: exit code {ending.returncode}: {words}", 1, log=ending.log)
    return None


# The order matters: a later cause may be a consequence of an earlier one.
_CAUSES = (
    _finished,
    _superseded,
    _out_of_memory,
    _broken_node,
    _own_fault,
    _killed,
    _vanished,
    _hung,
    _lost_peers,
    _stopped,
    _skipped,
)


def _by_signal(ending: Ending) -> bool:
    """Whether the process was killed by a signal, and neither by its guard nor on a request to its guard."""
    return ending.returncode < 0 and ending.ended_by is None and not ending.out_of_memory


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _who(ending: Ending) -> str:
    return f"rank {ending.rank} on {ending.host}"
