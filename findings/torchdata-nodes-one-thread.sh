#!/usr/bin/env bash
# torchdata 0.11.0 (torch 2.13.0): a node's worker thread calls torch.set_num_threads(1), and undoes the main thread's.
#
# After torch.set_num_threads(2) in the main thread and one pass through torchdata.nodes.ParallelMapper (method="thread"),
# torch.get_num_threads() is 1 in the main thread, if it has not computed anything in parallel yet; if it has, it stays 2.
# A program that sets the number first and loads data before its first matrix product computes with one thread.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q torchdata==0.11.0 numpy==2.4.6
cd "$work"
cat >threads.py <<'PYTHON'
import sys

import torch
from torchdata.nodes import IterableWrapper, Loader, ParallelMapper

torch.set_num_threads(2)
if sys.argv[1] == "after":
    torch.ones(512, 512) @ torch.ones(512, 512)
list(Loader(ParallelMapper(IterableWrapper(range(4)), lambda item: item, num_workers=1, method="thread")))
print(torch.get_num_threads())
PYTHON
before=$(venv/bin/python threads.py before)
after=$(venv/bin/python threads.py after)
echo "torch 2.13.0, torchdata 0.11.0: torch.set_num_threads(2), then one pass through a ParallelMapper with a thread"
echo "  before the first parallel operation: get_num_threads() is $before"
echo "  after it:                            get_num_threads() is $after"
if [ "$before" = 1 ] && [ "$after" = 2 ]; then
  echo "as found"
else
  echo "CHANGED: the worker thread no longer undoes set_num_threads in this way"
  exit 1
fi
