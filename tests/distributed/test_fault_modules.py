"""The modules that guard a run, in real processes of which one has a fault."""

from __future__ import annotations

import sys
from pathlib import Path

from support.running import run

WORKER = Path(__file__).with_name("fault_worker.py")


def test_every_fault_is_found_and_named(tmp_path: Path) -> None:
    """Wrong, slow and differing ranks (see fault_worker.py); then one hangs, which holds the others in a collective."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    ended = run([sys.executable, *launcher, str(WORKER), str(tmp_path)], expect=1)
    assert ended.stdout.count("all faults are found") == 3, ended.stderr[-4000:]
    # The watchdog has ended it, not the process group's time-out of half an hour: every rank says where it was.
    for rank in range(3):
        assert (tmp_path / f"outcome-{rank}").read_text() == "no step for 3 s"
        stacks = (tmp_path / "stacks" / f"rank-{rank}.txt").read_text()
        assert (" in asleep\n" if rank == 1 else " in all_reduce\n") in stacks
