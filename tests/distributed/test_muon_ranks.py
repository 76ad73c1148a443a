"""Muon on several ranks and engines, and its checkpoints from one to another: see muon_worker.py for what is compared.

Against torch.optim.Muon, on one process: tests/unit/engine/test_muon.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from support.running import run

WORKER = Path(__file__).with_name("muon_worker.py")


def work(num_processes: int, *arguments: str | Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    done = run([sys.executable, *launcher, str(WORKER), *map(str, arguments)])
    print(done.stdout)
    assert done.stdout.count("Muon equals the plain loop") == num_processes


@pytest.mark.slow
def test_every_engine_equals_a_plain_loop_and_loads_the_others(tmp_path: Path) -> None:
    """Two ranks train; FSDP2 and ZeRO 1, 2 and 3 on three ranks, and on one, go on from what ZeRO 2 has saved."""
    pytest.importorskip("deepspeed")
    work(2, "train", tmp_path)
    work(3, "go-on", tmp_path)
    work(1, "go-on", tmp_path)


@pytest.mark.slow
def test_copies_of_the_model_share_the_work_and_stay_equal() -> None:
    pytest.importorskip("deepspeed")  # which the worker imports
    work(4, "hsdp")
