"""The FSDP2 engine in real processes: initial weights, averages, the swap, the gradient norm."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from support.running import run

WORKER = Path(__file__).with_name("engine_worker.py")


@pytest.mark.parametrize("num_processes", [1, 3, 4])
def test_engine_equals_a_plain_loop(tmp_path: Path, num_processes: int) -> None:
    """The worker trains the same model by a plain PyTorch loop and compares; see engine_worker.py."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    done = run([sys.executable, *launcher, str(WORKER)])
    assert done.stdout.count("engine equals plain loop") == num_processes
