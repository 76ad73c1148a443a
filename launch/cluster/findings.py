"""Findings of a cluster check: facts of the cluster, compared with its profile. Pure functions: no files, no SLURM."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.scheduler import slurm
from pomscale.base.hosts import NOT_FOUND
from pomscale.config.cluster import ClusterProfile, minutes_of
from pomscale.runs.cluster_facts import RankFacts, WorldFacts

Status = Literal["ok", "warning", "FAILED"]

_SLOW_WRITE_GB_PER_S = 0.1  # a checkpoint of 10 GB then takes minutes
# Half of what the slowest links of this decade's machines reach: PCIe 4 inside, one port of 100 Gbit/s between.
_SLOW_INSIDE_GB_PER_S, _SLOW_ACROSS_GB_PER_S = 8.0, 5.0
_LATE_FILE_S = 5.0
_CLOCK_SKEW_S = 1.0
_FOLDERS = {"runs": "folder of runs", "temporary": "temporary folder", "home": "home folder"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. remedy: what to do if the status is not ok."""

    subject: str
    status: Status
    found: str
    remedy: str = ""


def slurm_findings(
    profile: ClusterProfile, configuration: Mapping[str, str], partitions: Mapping[str, Mapping[str, str]]
) -> list[Finding]:
    """Compare SLURM's configuration with the profile. partitions: by their names in the profile; "" is the default."""
    version, name = configuration.get("SLURM_VERSION", "?"), configuration.get("ClusterName", "?")
    accounting = "slurmdbd" in configuration.get("AccountingStorageType", "")
    memory_s = configuration.get("MinJobAge", "?")
    remembers = "works" if accounting else f"none: SLURM forgets a job {memory_s} after its end"
    return [
        Finding("SLURM", "ok", f"{version}, cluster {name}"),
        *(_partition_finding(profile, wanted, partition) for wanted, partition in partitions.items()),
        Finding("accounting", "ok", remembers),
    ]


def _partition_finding(profile: ClusterProfile, wanted: str, partition: Mapping[str, str]) -> Finding:
    if not partition:
        found = f"{wanted or 'a default one'}: no such partition"
        return Finding("partition", "FAILED", found, "change `partition`; `sinfo` lists them")
    name, limit = partition["PartitionName"], partition.get("MaxTime", "UNLIMITED")
    if partition.get("State") != "UP":
        return Finding("partition", "FAILED", f"{name} is {partition.get('State')}", "wait, or change `partition`")
    limit_s, asked = slurm.seconds_of(limit), profile.time_limit or "0:00:00"
    if limit_s is not None and minutes_of(asked) * 60 > limit_s:
        found = f"{name} allows {limit}, the profile asks for {asked}"
        # A QOS may allow more.
        status: Status = "FAILED" if profile.qos is None else "warning"
        return Finding("partition", status, found, f"make `time_limit` at most {limit}, or change `partition` or `qos`")
    return Finding("partition", "ok", f"{name}: {partition.get('TotalNodes')} nodes, at most {limit}")


def requeue_finding(details: Mapping[str, str]) -> Finding:
    """Check that the job may be requeued. details: of the job, from launch.scheduler.slurm."""
    if details.get("Requeue") == "1":
        return Finding("requeue", "ok", "allowed")
    remedy = "ask the site; until then submit again by `pomscale runs resume`"
    return Finding("requeue", "FAILED", "this cluster does not let jobs start again", remedy)


def name_findings(reason: str) -> list[Finding]:
    """Find out whether a job has failed because its nodes do not know each other. reason: why it has failed."""
    told = [part.rpartition("error: ")[2] for part in reason.split("; ") if NOT_FOUND in part]
    remedy = "ask the site for entries of its nodes in DNS or /etc/hosts; mount /etc/hosts into a container"
    return [Finding("names of nodes", "FAILED", what, remedy) for what in told[:1]]


def rank_findings(ranks: Mapping[int, RankFacts], num_ranks: int, profile: ClusterProfile, runs: Path) -> list[Finding]:
    """Compare what the ranks have found with the profile. ranks: those that have reported. runs: the folder of runs."""
    facts = list(ranks.values())
    missing = [rank for rank in range(num_ranks) if rank not in ranks]
    if missing:
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        heard = Finding("ranks", "FAILED", f"no report from rank {names} of {num_ranks}", "see the job above")
    else:
        heard = Finding("ranks", "ok", f"{num_ranks} on {_counted(len({one.node for one in facts}), 'node')}")
    if not facts:
        return [heard]
    return [
        heard,
        _same("Python", [(one.node, f"{one.python} ({one.executable})") for one in facts]),
        _same("torch", [(one.node, one.torch + (f", NCCL {one.nccl}" if one.nccl else "")) for one in facts]),
        _gpu_finding(facts, profile),
        _core_finding(facts, profile),
        *_interface_findings(facts, profile),
        *(_folder_finding(what, facts, profile, runs) for what in _FOLDERS),
        _internet_finding(facts, profile),
    ]


def _same(subject: str, reports: Iterable[tuple[str, str]]) -> Finding:
    """Check that all ranks have the same value. reports: (node, value of one of its ranks)."""
    nodes: dict[str, set[str]] = {}
    for node, value in reports:
        nodes.setdefault(value, set()).add(node)
    if len(nodes) == 1:
        return Finding(subject, "ok", next(iter(nodes)))
    found = "; ".join(f"{value} on {', '.join(sorted(where))}" for value, where in nodes.items())
    return Finding(subject, "FAILED", found, "all ranks must have the same: see `python`, `modules` and `setup`")


def _gpu_finding(facts: list[RankFacts], profile: ClusterProfile) -> Finding:
    if profile.gpus_per_node == 0:
        return Finding("GPUs", "ok", "none asked for")
    blind = sorted({one.node for one in facts if one.gpu is None})
    if blind:
        remedy = "see `nvidia-smi` there, `sbatch` and `container` in the profile, and whether this torch is for CUDA"
        return Finding("GPUs", "FAILED", f"torch sees none on {', '.join(blind)}", remedy)
    users: dict[tuple[str, str], list[int]] = {}
    for one in facts:
        assert one.gpu is not None
        users.setdefault((one.node, one.gpu[1]), []).append(one.rank)
    shared = [f"ranks {', '.join(map(str, ranks))} on {node}" for (node, _), ranks in users.items() if len(ranks) > 1]
    if shared:
        remedy = "every rank needs its own GPU: see `gpus_per_node`, and --gpus-per-task or --gpu-bind in `srun`"
        return Finding("GPUs", "FAILED", f"one GPU for {'; '.join(shared)}", remedy)
    names = sorted({one.gpu[0] for one in facts if one.gpu is not None})
    if profile.gpu is not None and not all(profile.gpu in name.lower() for name in names):
        return Finding("GPUs", "warning", f"{', '.join(names)}, not {profile.gpu}", "correct `gpu` or `constraint`")
    return Finding("GPUs", "ok", f"{len(users)} x {', '.join(names)}, one for each rank")


def _core_finding(facts: list[RankFacts], profile: ClusterProfile) -> Finding:
    fewest = min(facts, key=lambda one: one.num_cores)
    promised = profile.cpus_per_node // profile.num_ranks_per_node
    if fewest.num_cores < promised:
        found = f"rank {fewest.rank} on {fewest.node} may run on {fewest.num_cores}, not on {promised}"
        return Finding("cores", "warning", found, "see `cpus_per_node`; --cpu-bind=none in `srun` removes a binding")
    return Finding("cores", "ok", f"{fewest.num_cores} for each rank")


def _interface_findings(facts: list[RankFacts], profile: ClusterProfile) -> Iterable[Finding]:
    wanted = profile.network_interface
    if wanted is None:
        return
    without = [one for one in facts if not any(name in one.interfaces for name in wanted.split(","))]
    if without:
        found = f"{without[0].node} has no {wanted}, but {', '.join(without[0].interfaces)}"
        yield Finding("network interface", "FAILED", found, "correct `network_interface`")
    else:
        yield Finding("network interface", "ok", wanted)


def _folder_finding(what: str, facts: list[RankFacts], profile: ClusterProfile, runs: Path) -> Finding:
    subject = _FOLDERS[what]
    paths = str(runs) if what == "runs" else ", ".join(sorted({one.folders.get(what, "") for one in facts} - {""}))
    problems = [f"{one.node}: {one.cannot_write[what]}" for one in facts if what in one.cannot_write]
    remedies = {"runs": "change `scratch`", "temporary": "change `local_disk`", "home": "nothing of pomscale needs it"}
    if problems:
        needed = what == "runs" or (what == "temporary" and profile.local_disk is not None)
        return Finding(subject, "FAILED" if needed else "warning", "; ".join(problems), remedies[what])
    speeds = [one.write_gb_per_s[what] for one in facts if what in one.write_gb_per_s]
    if not speeds:
        return Finding(subject, "warning", "the first rank of no node has reported", "see the job above")
    found = f"{paths}: {_speed(min(speeds))} per node"
    if min(speeds) < _SLOW_WRITE_GB_PER_S and what != "home":
        return Finding(subject, "warning", f"{found}, which is slow", f"{remedies[what]} if there is a faster one")
    return Finding(subject, "ok", found)


def _internet_finding(facts: list[RankFacts], profile: ClusterProfile) -> Finding:
    if profile.offline:
        return Finding("internet", "ok", "not asked: the profile says offline")
    silent = sorted({one.internet for one in facts if one.internet is not None})
    if silent:
        return Finding(
            "internet", "FAILED", silent[0], "set `offline: true`; runs are uploaded by `pomscale runs sync`"
        )
    return Finding("internet", "ok", "wandb and Hugging Face answer")


def world_findings(world: WorldFacts | None, *, has_gpus: bool) -> list[Finding]:
    """Check the network between the ranks. world: None if their rendezvous failed. has_gpus: all ranks have one."""
    if world is None:
        remedy = "set `network_interface`; look for a firewall between the nodes; see the ranks' logs"
        return [Finding("rendezvous", "FAILED", "the ranks did not find each other", remedy)]
    findings = [Finding("rendezvous", "ok", f"{world.num_ranks} ranks in {world.join_s:.1f} s")]
    if world.problem is not None:
        findings.append(Finding("preflight", "FAILED", world.problem, "see `pomscale runs logs`, and exclude the host"))
    if world.matmul_tflops:
        median, slowest = world.matmul_tflops
        findings.append(Finding("computing", "ok", f"{median:.3g} TFLOP/s per rank (slowest {slowest:.3g})"))
    findings += [Finding("slow rank", "warning", warning, "exclude its node") for warning in world.warnings]
    findings += _all_reduce_findings(world, has_gpus=has_gpus)
    if len(world.clock_s) > 1:
        findings += [_shared_folder_finding(world), _clock_finding(world)]
    return findings


def _all_reduce_findings(world: WorldFacts, *, has_gpus: bool) -> Iterable[Finding]:
    inside = list(world.inside_gb_per_s.values())
    for where, speeds, slow, remedy in (
        ("inside nodes", inside, _SLOW_INSIDE_GB_PER_S, "see `nvidia-smi topo -m`: are the GPUs linked?"),
        (
            "across nodes",
            [] if world.across_gb_per_s is None else [world.across_gb_per_s],
            _SLOW_ACROSS_GB_PER_S,
            "NCCL_DEBUG: INFO in `environment` shows whether it uses sockets; set `network_interface`",
        ),
    ):
        if not speeds:
            continue
        found = f"{_speed(statistics.median(speeds))}" + (
            f" (slowest {_speed(min(speeds))})" if len(speeds) > 1 else ""
        )
        is_slow = has_gpus and min(speeds) < slow
        yield Finding(f"all-reduce {where}", "warning" if is_slow else "ok", found, remedy if is_slow else "")


def _shared_folder_finding(world: WorldFacts) -> Finding:
    blind = [node for node, seconds in world.seen_after_s.items() if seconds is None]
    if blind:
        found = f"{', '.join(blind)} does not see what other nodes write"
        return Finding("shared folder", "FAILED", found, "set `scratch` to a file system that all nodes share")
    longest_s = max(seconds for seconds in world.seen_after_s.values() if seconds is not None)
    found = f"a new file is seen by all within {longest_s:.2f} s"
    if longest_s > _LATE_FILE_S:
        return Finding("shared folder", "warning", found, "use another file system: starts and verdicts wait for files")
    return Finding("shared folder", "ok", found)


def _clock_finding(world: WorldFacts) -> Finding:
    node, ahead_s = max(world.clock_s.items(), key=lambda item: abs(item[1]))
    if abs(ahead_s) > _CLOCK_SKEW_S:
        found = f"{node} is {abs(ahead_s):.1f} s {'ahead' if ahead_s > 0 else 'behind'}"
        return Finding("clocks", "warning", found, "ask the site: clocks decide which rank is blamed for a failure")
    return Finding("clocks", "ok", f"at most {abs(ahead_s) * 1000:.0f} ms apart")


def signal_finding(num_arrived: int, num_ranks: int, took_s: float | None, problem: str) -> Finding:
    """Check that the signal before the time limit reaches all ranks.

    Args:
        num_arrived: Number of ranks that have received it.
        num_ranks: Number of all ranks.
        took_s: Time from sending the signal to the report of the last rank; None if it could not be sent.
        problem: Why it could not be sent.
    """
    remedy = "without the signal a run cannot save before its time limit: see `srun` and `container`"
    if took_s is None:
        return Finding("signals", "FAILED", problem or "not sent, as not all ranks were ready", remedy)
    if num_arrived < num_ranks:
        return Finding("signals", "FAILED", f"USR2 reached {num_arrived} of {num_ranks} ranks", remedy)
    return Finding("signals", "ok", f"USR2 reaches all ranks within {took_s:.1f} s")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _speed(gb_per_s: float) -> str:
    return f"{gb_per_s:.3g} GB/s"
