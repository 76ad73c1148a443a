#!/usr/bin/env bash
# torch 2.13.0, gloo: all_reduce of a matrix and an equal one in transposed memory adds them in memory order, silently.
#
# Rank 0 has [[0 1 2] [3 4 5]] with strides (3, 1), rank 1 the same values with strides (1, 2). Their sum is twice that
# matrix; rank 0 gets [[0 4 3] [7 6 10]], rank 1 [[0 3 6] [4 7 10]]. broadcast permutes the values likewise, all_gather goes
# by index and is right. Nothing warns, nor does TORCH_DISTRIBUTED_DEBUG=DETAIL, which compares shapes across ranks.
# pytorch issue 192920 (open) has the same of broadcast, reduce and scatter.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q numpy==2.4.6
cd "$work"
export TORCH_DISTRIBUTED_DEBUG=DETAIL
cat >sums.py <<'PYTHON'
import sys
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

VALUES = [[0, 1, 2], [3, 4, 5]]


def work(rank):
    """Save what each collective gives, and the number of warnings."""
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
    plain = torch.tensor(VALUES)
    mine = plain if rank == 0 else plain.t().contiguous().t()
    assert mine.tolist() == VALUES and mine.stride() == ((3, 1), (1, 2))[rank]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        total, sent, gathered = mine.clone(), mine.clone(), [torch.empty_like(plain) for _ in range(2)]
        dist.all_reduce(total)
        dist.broadcast(sent, 0)
        dist.all_gather(gathered, mine)
    torch.save([total.tolist(), sent.tolist(), gathered[1].tolist(), len(seen)], f"rank{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, nprocs=2)
    found = [torch.load(f"rank{rank}") for rank in range(2)]
    print(f"torch {torch.__version__}, gloo: two ranks have {VALUES}, the second one in transposed memory")
    for rank, (total, sent, gathered, warned) in enumerate(found):
        print(f"  rank {rank}: all_reduce {total}, broadcast {sent}, all_gather {gathered}; {warned} warnings")
    totals = [[0, 4, 3], [7, 6, 10]], [[0, 3, 6], [4, 7, 10]]
    as_found = found == [[totals[0], VALUES, VALUES, 0], [totals[1], [[0, 2, 4], [1, 3, 5]], VALUES, 0]]
    print("as found" if as_found else "CHANGED: gloo no longer adds in memory order, or says so")
    sys.exit(0 if as_found else 1)
PYTHON
venv/bin/python sums.py "$work/store" 2>errors || { cat errors; exit 1; }
