#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint calls fsync on .metadata before the bytes have left Python's buffer.
#
# FileSystemWriter(sync_files=True), the default, promises that files are on the disk. Of .metadata, without which a
# checkpoint cannot be read, fsync meets an empty file if its content fits into the buffer: os.fsync(fd) is called
# without stream.flush(). The data files are synced with all their bytes. After a power failure the checkpoint may be lost.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q numpy==2.4.6
cd "$work"
venv/bin/python -W ignore - <<'PYTHON'
import os
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

synced = {}  # bytes in the file at the time of its last fsync
fsync = os.fsync


def recording(file):
    number = file if isinstance(file, int) else file.fileno()
    synced[Path(os.readlink(f"/proc/self/fd/{number}")).name] = os.fstat(number).st_size
    fsync(file)


os.fsync = recording
dcp.save({"weight": torch.zeros(1000)}, storage_writer=dcp.FileSystemWriter("checkpoint"), no_dist=True)
print(f"torch {torch.__version__}: bytes in each file of a checkpoint when fsync was called, and at the end")
sizes = {path.name: path.stat().st_size for path in sorted(Path("checkpoint").iterdir())}
at_sync = {name: synced.get(name, synced.get(f"{name}.tmp")) for name in sizes}
for name, size in sizes.items():
    print(f"  {name:16} {at_sync[name]} of {size}")
data = [name for name in sizes if name.endswith(".distcp")]
as_found = at_sync[".metadata"] == 0 < sizes[".metadata"] and all(at_sync[name] == sizes[name] for name in data)
print("as found" if as_found else "CHANGED: .metadata is no longer synced before it is written")
sys.exit(0 if as_found else 1)
PYTHON
