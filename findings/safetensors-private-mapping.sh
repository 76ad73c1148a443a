#!/usr/bin/env bash
# safetensors 0.8.0 (torch 2.13.0): what get_tensor and load_file return is still the file, and changes with it.
#
# The tensors lie in a private mapping of the file. Bytes that another process writes into the file in place, after it was
# read and even after it was closed, appear in tensors whose pages have not been written to. A checksum that was right when
# the tensor was loaded says nothing about the tensor that is used: clone it first. (framework="numpy" copies.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6
cd "$work"
venv/bin/python -W ignore - <<'PYTHON'
import sys

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file

save_file({"weight": torch.zeros(4)}, "a.safetensors")
with safetensors.safe_open("a.safetensors", framework="pt") as file:
    by_get_tensor = file.get_tensor("weight")
with safetensors.safe_open("a.safetensors", framework="numpy") as file:
    by_numpy = file.get_tensor("weight")
by_load_file = load_file("a.safetensors")["weight"]
cloned = load_file("a.safetensors")["weight"].clone()
read = by_get_tensor.tolist(), by_load_file.tolist()
with open("a.safetensors", "r+b") as file:
    file.seek(-16, 2)
    file.write(np.ones(4, np.float32).tobytes())
print(f"safetensors {safetensors.__version__}, torch {torch.__version__}: zeros were read; then ones written in place")
print(f"  read: {read[0]}; now get_tensor: {by_get_tensor.tolist()}, load_file: {by_load_file.tolist()}")
print(f"  clone: {cloned.tolist()}, numpy: {by_numpy.tolist()}")
as_found = by_get_tensor.sum() == by_load_file.sum() == 4 and cloned.sum() == 0 and by_numpy.sum() == 0
print("as found" if as_found else "CHANGED: tensors no longer change with the file they were read from")
sys.exit(0 if as_found else 1)
PYTHON
