"""Compile the mixer's Triton kernels for an H100 or H200 (sm_90) without a GPU, and say what ptxas made of them.

    python -m support.triton_compiling          prints a JSON list of `Compiled`, as dictionaries
    python -m support.triton_compiling all      the same of every form, degree up to 4, dtype and mask of aggregations

A process of its own: where Triton interprets (tests/conftest.py), nothing compiles.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pomscale.ops.pom.triton_path import kernels, scan_kernels
from pomscale.ops.pom.triton_path.launch import Polynomial

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {
    **dict.fromkeys(("u", "gate", "y", "dy", "du", "dgate"), "of the tokens"),
    **dict.fromkeys(("items", "group_items", "segment_rows"), "*i32"),
    **dict.fromkeys(("positions", "query_positions", "past_count"), "*i64"),
    **dict.fromkeys(("partials", "sums", "values", "initial", "result", "totals", "carries", "means"), "*fp32"),
    **dict.fromkeys(("dsums", "dc", "frequencies", "coefficients"), "*fp32"),
    "mask": "*u8",
}
# As in models whose widths are multiples of 16: then strides and sizes are, and pointers always.
MULTIPLES_OF_16 = re.compile(r"width|piece|pairs\d|(u|gate|dy)_(row|batch)")
FORMS = {
    f"{name}-{degree}": Polynomial(width, degree, is_product, axes)
    for name, width, is_product, axes in (
        ("product", 4608, True, 0),
        ("coefficients", 2304, False, 0),
        ("rotary", 2304, False, 3),
        ("rotary of rows and columns", 2304, False, 2),
    )
    for degree in range(1, 5)
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Compiled:
    """registers: per thread. spilled: bytes of the stack. loads, stores: widths in bits of those of global memory."""

    kernel: str
    form: str
    dtype: str
    registers: int
    spilled: int
    loads: list[int]
    stores: list[int]


def compile_kernel(kernel: Any, form: str, dtype: str, **flags: bool) -> Compiled:
    polynomial, block, options = FORMS[form], FORMS[form].block(DTYPES[dtype]), {"num_warps": 2}
    if kernel is kernels.aggregate:
        block = polynomial.aggregation_block(DTYPES[dtype])
        options |= polynomial.aggregation_options(DTYPES[dtype])
    constants = {**polynomial.arguments(block), "DEGREE": polynomial.degree, "ROWS": 16}
    constants["TOKENS"] = options.pop("TOKENS", 1)
    constants |= {"MASKED": False, "GATED": True, "PAST": False, "INITIAL": False, "REVERSE": False, "EXCLUSIVE": False}
    if kernel in (kernels.sum_items, kernels.running_sums):
        constants["BLOCK"] = 64
    constants |= flags
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name.isupper() else POINTERS.get(name, "i32")
        signature[name] = f"*{dtype}" if kind == "of the tokens" else kind
        if kind not in ("constexpr", "i32") or MULTIPLES_OF_16.fullmatch(name):
            attributes[(place,)] = [["tt.divisibility", 16]]
    constants = {name: constants[name] for name in kernel.arg_names if name.isupper()}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return inspected(compiled.asm["cubin"], kernel.__name__, form, dtype)


def inspected(cubin: bytes, kernel: str, form: str, dtype: str) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = output(TOOLS / "cuobjdump", "-res-usage", file.name)
        code = output(TOOLS / "nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    assert "EXIT" in code
    local = re.findall(r"\b(?:LDL|STL)\b", code)
    return Compiled(
        kernel, form, dtype, registers, stack + len(local), widths(r"LDG\.E", code), widths(r"STG\.E", code)
    )


def widths(operation: str, code: str) -> list[int]:
    found = re.findall(rf"\b{operation}((?:\.\w+)*)", code)
    return sorted(
        {int(match[1]) if (match := re.search(r"\.(64|128)\b", suffix)) else 32 for suffix in found}, reverse=True
    )


def output(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def main() -> None:
    every = [
        kernels.aggregate_backward,
        kernels.select,
        kernels.select_backward,
        scan_kernels.scan,
        scan_kernels.scan_backward_of_gates,
        scan_kernels.scan_backward_of_features,
    ]
    is_all = sys.argv[1:] == ["all"]
    forms = list(FORMS) if is_all else ["product-2", "product-4", "coefficients-4", "rotary-2", "rotary-4"]
    plan: list[tuple[Any, str, str]] = [
        *((kernel, "product-2", "fp32") for kernel in (kernels.sum_items, kernels.running_sums)),
        *((kernel, "product-2", "bf16") for kernel in every),
        *((kernel, "rotary-2", "bf16") for kernel in (every[0], every[2], every[5])),
        *((kernel, "product-2", "fp32") for kernel in (every[0], every[1], every[3])),
    ]
    found = [compile_kernel(*one) for one in plan]
    for number, form in enumerate(forms):
        for other, dtype in enumerate(DTYPES):
            for is_masked in (False, True):
                if is_all or (number + other + is_masked) % 2 == 0:  # half, with every pair of form, dtype and mask
                    found.append(compile_kernel(kernels.aggregate, form, dtype, MASKED=is_masked))
    print(json.dumps([asdict(one) for one in found]))


if __name__ == "__main__":
    main()
