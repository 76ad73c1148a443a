#!/usr/bin/env bash
# triton 3.9.0: tl.cos and tl.sin bring a branch for huge angles into every element; a rotary kernel has 5 times the code.
#
# A bf16 kernel that turns pairs of channels by position * frequency, compiled for sm_90 without a GPU: with tl.cos and tl.sin
# 2,096 instructions, 65 branches and 64 registers for 1,024 pairs; with a reduction by quarter turns in three parts and the
# polynomials of Cephes, which serve angles up to 10^4 to 1e-7, 368, 1 and 32. Each element has the branches of Payne and
# Hanek's reduction, once for the cosine and once for the sine, though they are never taken by angles below 10^5.
# triton 3.7.1 has 1,440 instructions, 49 branches, 51 registers and a stack. The documentation names no such cost.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q triton==3.9.0
cd "$work"
export TRITON_CACHE_DIR="$work/cache" TRITON_DEFAULT_FP_FUSION=1
cat >rotate.py <<'PYTHON'
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def reduced(angle):
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = angle - turns * 1.5703125 - turns * 4.8375129699707031e-4 - turns * 7.5497899548918821e-8
    z = rest * rest
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * rest + rest
    quarter = turns.to(tl.int32)
    odd = (quarter & 1) != 0
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -first, first), tl.where((quarter & 2) != 0, -second, second)


@triton.jit
def rotate(x, out, positions, frequencies, REDUCED: tl.constexpr, PAIRS: tl.constexpr):
    pair = tl.arange(0, PAIRS)
    at = tl.program_id(0) * 2 * PAIRS + pair
    angle = tl.load(positions + tl.program_id(0)).to(tl.float32) * tl.load(frequencies + pair)
    if REDUCED:
        cosine, sine = reduced(angle)
    else:
        cosine, sine = tl.cos(angle), tl.sin(angle)
    first, second = tl.load(x + at).to(tl.float32), tl.load(x + at + PAIRS).to(tl.float32)
    tl.store(out + at, (first * cosine - second * sine).to(tl.bfloat16))
    tl.store(out + at + PAIRS, (first * sine + second * cosine).to(tl.bfloat16))


def compiled(is_reduced, pairs):
    """Instructions, branches and registers of the kernel on an H100."""
    signature = {"x": "*bf16", "out": "*bf16", "positions": "*i64", "frequencies": "*fp32"}
    signature |= {"REDUCED": "constexpr", "PAIRS": "constexpr"}
    source = ASTSource(fn=rotate, signature=signature, constexprs={"REDUCED": is_reduced, "PAIRS": pairs})
    Path("kernel.cubin").write_bytes(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    code, usage = [
        subprocess.run([tool, option, "kernel.cubin"], capture_output=True, text=True, check=True).stdout
        for option in ("-sass", "--dump-resource-usage")
    ]
    instructions = re.findall(r"^\s*/\*[0-9a-f]{4,5}\*/ *(.*?);", code, re.MULTILINE)
    return len(instructions), sum(" BRA " in f" {text} " for text in instructions), int(re.search(r"REG:(\d+)", usage)[1])


print(f"triton {triton.__version__}, sm_90: instructions, branches and registers of a kernel that turns pairs of channels")
as_found = True
for pairs in (256, 512, 1024):
    own, library = compiled(True, pairs), compiled(False, pairs)
    print(f"  {pairs:4} pairs: own reduction {own}, tl.cos and tl.sin {library}")
    as_found &= library[0] > 2 * own[0] and library[1] > 8 * own[1] and library[2] >= own[2]
as_found &= library[2] > 1.4 * own[2]
print("as found" if as_found else "CHANGED: tl.cos and tl.sin no longer cost so much code")
sys.exit(0 if as_found else 1)
PYTHON
venv/bin/python rotate.py
