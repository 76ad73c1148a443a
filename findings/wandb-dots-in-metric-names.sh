#!/usr/bin/env bash
# wandb 0.31.0: define_metric("a.b") does not define the metric that is logged as "a.b", and says nothing.
#
# The name is a path into nested dictionaries: it defines the metric of log({"a": {"b": ...}}). For log({"a.b": ...}) the
# dot must be escaped: define_metric(r"a\.b"). Otherwise the metric keeps the default summary, its last value. wandb means
# it so, but define_metric's documentation does not say it; log takes dots, though wandb's pages advise against them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q wandb==0.31.0
cd "$work"
export WANDB_MODE=offline WANDB_SILENT=true WANDB_DIR="$work"
venv/bin/python - <<'PYTHON'
import sys

import wandb


def summary(defined, logged):
    """Summary of the metric that is `logged`, after 2, 1, 3, where `defined` has summary="min"."""
    run = wandb.init(project="findings", settings=wandb.Settings(console="off"))
    run.define_metric(defined, summary="min")
    for value in (2, 1, 3):
        run.log(logged(value))
    found = run.summary["a.b"] if "a.b" in run.summary.keys() else run.summary["a"]["b"]
    found = found if isinstance(found, int) else dict(found)
    run.finish()
    return found


def dotted(value):
    return {"a.b": value}


def nested(value):
    return {"a": {"b": value}}


plain, escaped = "a.b", r"a\.b"
cases = [(plain, dotted), (escaped, dotted), (plain, nested), (escaped, nested)]
found = [summary(*case) for case in cases]
print(f'wandb {wandb.__version__}: define_metric(..., summary="min"), then the values 2, 1, 3')
for (defined, logged), value in zip(cases, found):
    print(f"  defined as {defined:5} logged as {logged('...')!s:22} summary {value}")
as_found = found == [3, {"min": 1}, {"min": 1}, 3]
print("as found" if as_found else "CHANGED: a dot in define_metric no longer means a path in this way")
sys.exit(0 if as_found else 1)
PYTHON
