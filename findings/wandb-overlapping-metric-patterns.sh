#!/usr/bin/env bash
# wandb 0.31.0: where two patterns of define_metric match a metric, either of them applies, by chance, metric by metric.
#
# With "*" (no summary) and "v/*" (summary="min"), some of 400 metrics v/... get {"min": 1} as their summary and the others
# the last value, 3; which of them differs from run to run. The order of the calls does not matter. A whole name in place
# of a pattern always wins.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q wandb==0.31.0
cd "$work"
export WANDB_MODE=offline WANDB_SILENT=true WANDB_DIR="$work"
venv/bin/python - <<'PYTHON'
import glob
import struct
import sys

import wandb
from wandb.proto.wandb_internal_pb2 import Record


def records(path):
    """The records of an offline run: chunks (crc32, length, kind, data) in blocks of 32 KiB."""
    data, position, parts = open(path, "rb").read(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + 7 : position + 7 + length]
        position += 7 + length
        parts = chunk if kind in (1, 2) else parts + chunk
        if kind in (1, 4):
            yield Record.FromString(parts)


def summaries():
    """Summary of each of 400 metrics, after the values 2, 1, 3."""
    names = [f"v/{number:03d}" for number in range(400)]
    run = wandb.init(project="findings", settings=wandb.Settings(console="off"))
    run.define_metric("samples")
    run.define_metric("*", step_metric="samples")
    run.define_metric("v/*", step_metric="samples", summary="min")
    run.define_metric("v/000", step_metric="samples", summary="min")
    for samples, value in enumerate((2.0, 1.0, 3.0)):
        run.log({"samples": samples, **dict.fromkeys(names, value)})
    run.finish()
    found = {}
    for record in records(glob.glob(f"wandb/offline-run-*-{run.id}/*.wandb")[0]):
        for item in record.summary.update:
            found[item.key or ".".join(item.nested_key)] = item.value_json
    return [found[name] for name in names]


first, second = summaries(), summaries()
print(f'wandb {wandb.__version__}: 400 metrics, patterns "*" and "v/*" (summary="min"), values 2, 1, 3')
for run in (first, second):
    minima = sum(value == '{"min":1}' for value in run[1:])
    print(f"  {minima} have a minimum, {sum(value == '3' for value in run[1:])} the last value")
print(f"  other in the second run: {sum(a != b for a, b in zip(first, second))}; by whole name: {first[0]}, {second[0]}")
mixed = all(20 < sum(value == "3" for value in run[1:]) < 380 for run in (first, second))
as_found = mixed and first != second and first[0] == second[0] == '{"min":1}'
print("as found" if as_found else "CHANGED: it is no longer chance which pattern applies")
sys.exit(0 if as_found else 1)
PYTHON
