"""Tokens of a sample split over real ranks: the mixer and its gradients, engines, and runs.

The same in one process: tests/numerics/test_split_tokens.py. Runs beside those of other layouts: test_parity.py.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from support.running import run

WORKER = Path(__file__).with_name("sequence_worker.py")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.parametrize(
    ("num_processes", "checks"),
    [
        pytest.param(4, ["sums", "hsdp"], id="groups of 2, 3 and 4, HSDP"),
        pytest.param(3, ["fsdp2"], id="fsdp2 x3", marks=pytest.mark.slow),
        pytest.param(4, ["fsdp2", "fsdp2-full"], id="fsdp2 x4", marks=pytest.mark.exhaustive),
        pytest.param(2, ["compiled", "fsdp2", "fsdp2-full"], id="compiled, fsdp2 x2", marks=pytest.mark.slow),
        pytest.param(2, ["zero-1", "zero-2", "zero-3"], id="ZeRO x2", marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param(4, ["zero-1", "zero-2", "zero-3"], id="ZeRO x4", marks=[needs_deepspeed, pytest.mark.exhaustive]),
    ],
)
def test_split_tokens_equal_one_process(num_processes: int, checks: list[str]) -> None:
    """The worker compares with a process that has all tokens; see sequence_worker.py."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    done = run([sys.executable, *launcher, str(WORKER), *checks])
    assert done.stdout.count("equal") == num_processes * len(checks)
