#!/usr/bin/env bash
# triton: the interpreter (TRITON_INTERPRET=1) refuses two kernels that every version compiles.
#
# 3.9.0: in `(channels < n) & (row < 3)` the scalar comparison becomes a vector of 8-bit integers. The dtype still says int1,
# but tl.load raises "mask has unsupported dtype". 3.7.1 and 3.6.0 take it. Two vectors compared are fine.
# 3.6.0 with numpy 2.4: `for i in range(n)` with a run-time n raises "only 0-dimensional arrays can be converted to Python
# scalars"; its metadata sets no bound on numpy. 3.7.1 and 3.9.0 take it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q numpy==2.4.6
cd "$work"
export TRITON_CACHE_DIR="$work/cache" TRITON_DEFAULT_FP_FUSION=1
cat >kernels.py <<'PYTHON'
import os

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def mask(x, out, n, row, BLOCK: tl.constexpr):
    channels = tl.arange(0, BLOCK)
    tl.store(out + channels, tl.load(x + channels, (channels < n) & (row < 3), 0.0))


@triton.jit
def loop(x, out, n, row, BLOCK: tl.constexpr):
    channels = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n):
        total += tl.load(x + channels)
    tl.store(out + channels, total)


def interpreted(kernel):
    out = torch.zeros(4)
    try:
        kernel[(1,)](torch.arange(4.0), out, 2, 0, BLOCK=4)
    except Exception as error:
        return f"raises {error}"
    return out.tolist()


def compiled(kernel):
    signature = {"x": "*fp32", "out": "*fp32", "n": "i32", "row": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": 4})
    return "compiled" if triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"] else "empty"


run = interpreted if os.environ["TRITON_INTERPRET"] == "1" else compiled
for name, kernel in (("mask", mask), ("loop", loop)):
    print(f"  {triton.__version__} {run.__name__:11} {name} {run(kernel)}")
PYTHON
echo "torch 2.13.0, numpy 2.4.6, three versions of triton"
for version in 3.6.0 3.7.1 3.9.0; do
  venv/bin/pip install -q --no-deps --target "triton-$version" "triton==$version"
  for interpret in 1 0; do
    PYTHONPATH="triton-$version" TRITON_INTERPRET=$interpret venv/bin/python kernels.py
  done
done | tee found
cat >expected <<'END'
  3.6.0 interpreted mask [0.0, 1.0, 0.0, 0.0]
  3.6.0 interpreted loop raises TypeError('only 0-dimensional arrays can be converted to Python scalars')
  3.6.0 compiled    mask compiled
  3.6.0 compiled    loop compiled
  3.7.1 interpreted mask [0.0, 1.0, 0.0, 0.0]
  3.7.1 interpreted loop [0.0, 2.0, 4.0, 6.0]
  3.7.1 compiled    mask compiled
  3.7.1 compiled    loop compiled
  3.9.0 interpreted mask raises ValueError('mask has unsupported dtype')
  3.9.0 interpreted loop [0.0, 2.0, 4.0, 6.0]
  3.9.0 compiled    mask compiled
  3.9.0 compiled    loop compiled
END
if diff expected found; then
  echo "as found"
else
  echo "CHANGED: the interpreter no longer refuses these kernels in this way"
  exit 1
fi
