"""A real SLURM cluster on one machine: its own daemons, keys, ports and folder, started in a second, for tests.

    munged                    signs what the others say to each other
    slurmctld                 the controller
    slurmd -N 127.0.0.1 ...   one per node; the nodes' names are loopback addresses, so that a rendezvous finds them
    slurmdbd, mariadbd        only where sacct is to work

Nothing of it outlives the process that started it, even if that is killed: a keeper (this file, run as a program) waits
for that end, and kills whatever carries the cluster's configuration in its environment, jobs included.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from getpass import getuser
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

_PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
_ACCOUNTING_PACKAGES = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}

CPUS_PER_NODE = 8
GPUS_PER_NODE = 4  # to SLURM; no program will find one
ACCOUNT = "lab"  # the one that may be charged, where there is accounting
GRACE_S = 120  # between the signal and the end of a job that is preempted
KILL_WAIT_S = 20  # between SIGTERM and SIGKILL

_WAIT_S = 120  # longer than what only waits for a busy machine


def missing_packages(*, accounting: bool) -> list[str]:
    """Debian packages that a cluster needs and this machine lacks."""
    packages = _PACKAGES | (_ACCOUNTING_PACKAGES if accounting else {})
    return [package for command, package in packages.items() if _found(command) is None]


class SlurmCluster:
    """A cluster that runs for the duration of a `with` block.

    accounting: with slurmdbd, so that sacct works and jobs are charged to ACCOUNT; else sacct fails, as at sites that
    have no such thing.
    """

    def __init__(self, *, accounting: bool = False, num_nodes: int = 3) -> None:
        self.accounting = accounting
        self.nodes = [f"127.0.0.{number}" for number in range(1, num_nodes + 1)]
        # Not under pytest's folders: the path of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.config = self.folder / "slurm.conf"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(self.config),
            "OMP_NUM_THREADS": "1",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._keeper: subprocess.Popen[bytes] | None = None
        self._ports = _Ports()
        self._leaving = threading.Event()

    # Life

    def __enter__(self) -> SlurmCluster:
        self._keeper = subprocess.Popen(
            [sys.executable, __file__, str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self._write_configuration()
            self._start()
            threading.Thread(target=self._end_scripts, name="end of job scripts", daemon=True).start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End everything at once, and remove the folder."""
        self._leaving.set()
        if self._keeper is not None:
            self._keeper.communicate()
            self._keeper = None
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        self._ports.release()

    def _end_scripts(self) -> None:
        """Kill job scripts that only wait for SLURM to kill them, which would take KILL_WAIT_S.

        These are the scripts that have requeued their job: the last thing that slurm/requeue.sh does is to sleep.
        """
        while not self._leaving.wait(2):
            for number in filter(str.isdecimal, os.listdir("/proc")):
                with suppress(OSError, psutil.Error):
                    if Path("/proc", number, "cmdline").read_bytes() != b"sleep\x0060\x00":
                        continue
                    process = psutil.Process(int(number))
                    script = process.parent()
                    if _belongs_to(process, self.folder) and script is not None:
                        script.kill()
                        process.kill()

    def reset(self) -> None:
        """No jobs, and every node up: as a test expects it."""
        for name in ["slurmctld", *self.nodes]:
            if self._daemons[name].poll() is not None:
                self._start_slurmctld() if name == "slurmctld" else self.start_slurmd(name)
        self._wait("slurmctld is not up", self._answers)
        self.run(["scancel", "--user", getuser()])
        self._wait("jobs still there", self._is_clear, every_s=0.1)
        for node in self.nodes:  # SLURM refuses it for one that is up
            self._succeeds(["scontrol", "update", f"NodeName={node}", "State=RESUME"])
        self._wait_until_up()

    def _is_clear(self) -> bool:
        for process in processes_in(self.folder):
            if "SLURM_JOB_ID" in _environment(process):
                _kill(process)  # it would have KILL_WAIT_S
        return not self.run(["squeue", "-h", "-o", "%i"])

    # What tests do

    def run(self, words: list[str], *, timeout_s: float = _WAIT_S, **options: Any) -> str:
        """The output of a command in the cluster's environment; AssertionError, with its words, if it fails."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False, **options
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str, *options: str, cwd: Path | None = None) -> str:
        """sbatch of a bash script. Its job id. Its output goes to slurm-%j.out in cwd, or in the cluster's folder."""
        words = ["sbatch", "--parsable", *options]
        return self.run(words, input=f"#!/bin/bash\n{script}\n", cwd=cwd or self.folder).strip()

    def job_state(self, job_id: str) -> str:
        """Return the state that squeue shows; "" for a job that it does not know."""
        found = self.run(["squeue", "-h", "-r", "-t", "all", "-o", "%i %T"])
        return dict(line.split() for line in found.splitlines()).get(job_id, "")

    def wait_for(self, job_id: str, *states: str, timeout_s: float = _WAIT_S) -> str:
        """Wait for one of these states and return it; AssertionError with all that SLURM knows if none comes."""
        deadline_s = time.monotonic() + timeout_s
        while (state := self.job_state(job_id)) not in states:
            if time.monotonic() > deadline_s:
                known = self.run(["scontrol", "show", "job", job_id.partition("_")[0]])
                raise AssertionError(
                    f"job {job_id} is {state}, not {' or '.join(states)}, after {timeout_s} s:\n{known}"
                )
            time.sleep(0.05)
        return state

    def processes_of(self, job_id: str) -> list[psutil.Process]:
        """Return the live processes, on all nodes, that have the job's id in their environment."""
        return [process for process in processes_in(self.folder) if _environment(process).get("SLURM_JOB_ID") == job_id]

    def set_node(self, node: str, state: Literal["DOWN", "RESUME", "DRAIN"]) -> None:
        self.run(["scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test"])

    def kill_slurmd(self, node: str) -> None:
        """Kill the node's daemon, as if the node had crashed, except that its jobs live on."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def start_slurmd(self, node: str) -> None:
        self._daemon(node, ["slurmd", "-D", "-N", node])

    def kill_controller(self) -> None:
        self._daemons["slurmctld"].kill()
        self._daemons["slurmctld"].wait()

    def start_controller(self, *, forget_jobs: bool = False) -> None:
        """forget_jobs: it starts with an empty memory, as after MinJobAge; job ids begin at 1 again."""
        self._start_slurmctld(*(["-c"] if forget_jobs else []))
        self._wait_until_up()

    def profile(self, folder: Path, **overrides: Any) -> Path:
        """Write folder/test.yaml, a cluster profile of this cluster: two ranks per node, on CPUs."""
        values = {
            "kind": "cluster",
            "scheduler": "slurm",
            "partition": "low",
            "account": ACCOUNT if self.accounting else None,
            "gpus_per_node": 0,
            "cpus_per_node": 4,
            "ranks_per_node": 2,
            # submitit takes every USR2 for a time-out where the limit is 10 minutes or less.
            "time_limit": "0:40:00",
            "signal_lead_s": 60,
            "python": sys.executable,
            "environment": {"OMP_NUM_THREADS": "1"},
            "offline": True,
        }
        path = folder / "test.yaml"
        path.write_text(yaml.safe_dump({**values, **overrides}))
        return path

    # How it is made

    def _write_configuration(self) -> None:
        controller_port, database_port, *node_ports = self._ports.take(2 + len(self.nodes))
        authentication = f"AuthType=auth/munge\nAuthInfo=socket={self.folder}/munge.sock,cred_expire=5"
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={CPUS_PER_NODE} RealMemory=16000 Gres=gpu:{GPUS_PER_NODE}"
            for node, port in zip(self.nodes, node_ports, strict=True)
        )
        accounting = f"""
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={database_port}
AccountingStoragePass={self.folder}/munge.sock
AccountingStorageEnforce=associations
"""
        for folder in ("state", "spool"):
            (self.folder / folder).mkdir()
        for gpu in range(GPUS_PER_NODE):
            (self.folder / f"gpu{gpu}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS_PER_NODE - 1}]\n")
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        # cred_expire: how long a requeued job waits; 5 s is the least that is honoured.
        # linuxproc and task/none need neither cgroups nor systemd. config_overrides: more CPUs than there are.
        # Timeouts and MinJobAge: a busy machine is not to take anybody for dead, nor to forget how a job ended.
        # preempt_send_user_signal: a job that is preempted gets the signal it asked for; SIGTERM otherwise.
        self.config.write_text(
            f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={getuser()}
SlurmdUser={getuser()}
{authentication}
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
GresTypes=gpu
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
KillWait={KILL_WAIT_S}
SlurmdTimeout=300
MessageTimeout=40
BatchStartTimeout=300
ReturnToService=2
JobRequeue=1
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{accounting if self.accounting else ""}
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={GRACE_S} MaxTime=2:00:00
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=2:00:00
"""
        )
        (self.folder / "slurmdbd.conf").write_text(
            f"""
{authentication}
DbdHost=localhost
DbdPort={database_port}
SlurmUser={getuser()}
PidFile={self.folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
"""
        )
        (self.folder / "slurmdbd.conf").chmod(0o600)

    def _start(self) -> None:
        munge = {"socket": "munge.sock", "key-file": "munge.key", "log-file": "munged.log", "pid-file": "munged.pid"}
        options = [f"--{name}={self.folder / file}" for name, file in {**munge, "seed-file": "munge.seed"}.items()]
        self._daemon("munged", ["munged", "--foreground", "--force", "--num-threads=2", *options])
        self._wait("munged is not up", (self.folder / "munge.sock").exists)
        if self.accounting:
            self._start_accounting()
        self._start_slurmctld("-c")
        for node in self.nodes:
            self.start_slurmd(node)
        self._wait_until_up()

    def _start_slurmctld(self, *options: str) -> None:
        self._daemon("slurmctld", ["slurmctld", "-D", *options])

    def _start_accounting(self) -> None:
        data, database_socket = self.folder / "database", self.folder / "mariadb.sock"
        place = ["--no-defaults", f"--user={getuser()}", f"--datadir={data}"]
        # root has no password: the socket lies in a folder of ours alone.
        self.run(["mariadb-install-db", *place, "--skip-test-db", "--auth-root-authentication-method=normal"])
        options = [f"--socket={database_socket}", "--skip-networking", f"--pid-file={self.folder}/mariadbd.pid"]
        options += ["--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M"]
        self._daemon("mariadbd", ["mariadbd", *place, *options])
        self._wait("mariadbd is not up", database_socket.exists)
        self._daemon("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(database_socket))
        self._wait("slurmdbd is not up", lambda: self._succeeds(["sacctmgr", "-i", "add", "cluster", "test"]))
        self.run(["sacctmgr", "-i", "add", "account", ACCOUNT, "Cluster=test"])
        self.run(["sacctmgr", "-i", "add", "user", getuser(), f"Account={ACCOUNT}"])

    def _wait_until_up(self) -> None:
        self._wait("slurmctld is not up", self._answers)
        self._wait("nodes are not up", lambda: set(self.run(["sinfo", "-h", "-N", "-o", "%T"]).split()) <= {"idle"})

    def _answers(self) -> bool:
        return self._succeeds(["scontrol", "ping"])

    def _succeeds(self, words: list[str]) -> bool:
        return subprocess.run(words, env=self.environment, capture_output=True, check=False).returncode == 0

    def _daemon(self, name: str, words: list[str], **environment: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [_found(words[0]) or words[0], *words[1:]],
                env={**self.environment, **environment},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for pytest, which ends it in its own way
            )

    def _wait(self, complaint: str, condition: Callable[[], bool], every_s: float = 0.02) -> None:
        deadline_s = time.monotonic() + _WAIT_S
        while not condition():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline_s:
                logs = "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.out")))
                raise RuntimeError(f"{complaint} (ended: {', '.join(dead) or 'nothing'})\n{logs}")
            time.sleep(every_s)


def _found(command: str) -> str | None:
    # Daemons are not on everybody's PATH.
    return shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class _Ports:
    """The ports of one cluster, below those that the system gives to outgoing connections.

    Other workers of the same tests draw at the same time: each port has a name (a socket without a file), which only
    one of them can have.
    """

    def __init__(self) -> None:
        self._names: list[socket.socket] = []

    def take(self, number: int) -> list[int]:
        found: list[int] = []
        chance = random.SystemRandom()  # no seed, or all workers would try the same ones
        while len(found) < number:
            port = chance.randrange(11000, 20000)
            name = socket.socket(socket.AF_UNIX)
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    name.bind(f"\0pomscale test cluster, port {port}")
                    probe.bind(("", port))
                except OSError:
                    name.close()
                    continue
            self._names.append(name)
            found.append(port)
        return found

    def release(self) -> None:
        for name in self._names:
            name.close()
        self._names.clear()


def _environment(process: psutil.Process) -> dict[str, str]:
    """Empty for one that has just ended, and for those of others."""
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def processes_in(folder: Path) -> list[psutil.Process]:
    """All of the cluster in this folder that are alive: daemons, and jobs on all nodes."""
    return [process for process in psutil.process_iter(["name", "cwd"]) if _belongs(process, folder)]


def _belongs_to(process: psutil.Process, folder: Path) -> bool:
    return _environment(process).get("SLURM_CONF") == str(folder / "slurm.conf")


def _belongs(process: psutil.Process, folder: Path) -> bool:
    if _belongs_to(process, folder):
        return True
    # A slurmstepd writes its title over its environment; it stays in the folder of its slurmd.
    return process.info["cwd"] == str(folder) and process.info["name"].startswith("slurm")


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def _keep(folder: Path) -> None:
    """Wait until nobody holds our standard input any more, then leave nothing of the cluster."""
    sys.stdin.read()
    while processes := processes_in(folder):
        for process in processes:
            _kill(process)
        time.sleep(0.02)
    shutil.rmtree(folder)


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
