"""How long from SLURM's start of a job to its first step, beside bare torchrun; and from the command to the job.

    OMP_NUM_THREADS=1 python tests/slurm/measure_start.py --out FILE.json       on an idle machine

Needs the packages of the test cluster. Both run the same recipe on two ranks, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pomscale.benchmarks.report import BenchReport
from support.cluster import SlurmCluster
from support.digits import make_digits
from support.launched import launch
from support.running import ENVIRONMENT, GLOBAL_BATCH, write_tiny_recipe

SHORT = [f"training.total_samples={10 * GLOBAL_BATCH}", "schedule={}", "monitoring.wandb.mode=disabled"]


def bare(folder: Path, digits: Path) -> float:
    """Seconds from torchrun's start to the first row."""
    recipe = write_tiny_recipe(folder, digits)
    begin_unix_s = time.time()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pomscale"]
    command = [*torchrun, "train", str(recipe), *SHORT, "faults.preflight=false"]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    return first_row_unix_s(folder) - begin_unix_s


def launched(cluster: SlurmCluster, folder: Path, digits: Path, **profile: str) -> tuple[float, float]:
    """(seconds from the first process of the job to the first row, from the command to the job's id)."""
    cluster.profile(folder, **profile)
    begin_s = time.perf_counter()
    run = launch(cluster, folder, digits, *SHORT, num_nodes=1)
    submit_s = time.perf_counter() - begin_s
    first_unix_s = 0.0
    while not first_unix_s:
        found = [process.create_time() for process in alive(cluster, run.job_id)]
        first_unix_s = min(found, default=0.0)
        time.sleep(0.01)
    run.finish()
    return first_row_unix_s(folder) - first_unix_s, submit_s


def alive(cluster: SlurmCluster, job_id: str) -> list[psutil.Process]:
    return [process for process in cluster.processes_of(job_id) if process.is_running()]


def first_row_unix_s(folder: Path) -> float:
    with (folder / "runs" / "tiny" / "metrics.jsonl").open() as file:
        return json.loads(file.readline())["time_unix_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = BenchReport("start of a job")
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as root, SlurmCluster() as cluster:
        digits = Path(root) / "data"
        digits.mkdir()
        make_digits(digits)
        for turn in range(arguments.num_turns):
            for what in ("bare torchrun", "srun", "torchrun"):
                folder = Path(root) / f"{what.replace(' ', '-')}-{turn}"
                folder.mkdir()
                if what == "bare torchrun":
                    seconds.setdefault(what, []).append(bare(folder, digits))
                else:
                    start_s, submit_s = launched(cluster, folder, digits, ranks_by=what)
                    seconds.setdefault(what, []).append(start_s)
                    seconds.setdefault("submit", []).append(submit_s)
    rival_s = statistics.median(seconds["bare torchrun"])
    report.add("bare torchrun, process to first row", median_s=rival_s, all_s=seconds["bare torchrun"])
    for what in ("srun", "torchrun"):
        median_s = statistics.median(seconds[what])
        report.add(f"SLURM, ranks_by {what}, first process to first row", median_s=median_s, all_s=seconds[what])
        report.decide_verdict(f"overhead, ranks_by {what}, s", median_s - rival_s, 3.0, at_least=False)
    slowest_s = max(seconds["submit"])
    report.add("pomscale launch, command to job id", median_s=statistics.median(seconds["submit"]), most_s=slowest_s)
    report.decide_verdict("slowest launch, s", slowest_s, 3.0, at_least=False)
    if arguments.out:
        report.write(arguments.out)


if __name__ == "__main__":
    main()
