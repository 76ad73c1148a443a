"""The next start of a run loads what one start has compiled, on a machine that has no cache of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pomscale.distributed.compile_cache import CompileCache
from pomscale.runs.layout import COMPILE_CACHE_FILE
from support.running import run

START = """
import os, sys
from pathlib import Path
os.environ["TORCHINDUCTOR_CACHE_DIR"] = sys.argv[2]
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process
import torch
from torch._inductor import cpp_builder
from torch._dynamo.utils import counters
from pomscale.distributed.compile_cache import CompileCache

commands, run = [], cpp_builder.run_compile_cmd
cpp_builder.run_compile_cmd = lambda command, cwd: (commands.append(command), run(command, cwd))
cache = CompileCache(Path(sys.argv[1]), is_main=True)
cache.load()
for name in sys.argv[3:]:
    torch.compile(getattr(torch, name))(torch.ones(64))
cache.save()
num_kernels = sum(".main.cpp" in command for command in commands)
print(f"traced: {counters['inductor']['fxgraph_cache_miss']}, by g++: {num_kernels}")
"""


@pytest.mark.slow
def test_a_start_elsewhere_traces_nothing_again(tmp_path: Path) -> None:
    """Nor what the start before it had no use for: it may have ended before its first validation.

    On CPUs g++ compiles again, as docs/how-to/train.md says; once torch spares that too, the page may promise it.
    """
    starts = (("first", ("sin", "cos"), (2, 2)), ("second", ("sin",), (0, 1)), ("third", ("cos",), (0, 1)))
    for node, functions, (num_traced, num_by_gpp) in starts:
        start = [sys.executable, "-c", START, str(tmp_path), str(tmp_path / node), *functions]
        assert run(start, timeout=600).stdout == f"traced: {num_traced}, by g++: {num_by_gpp}\n", node


def test_only_the_main_rank_of_a_run_that_compiles_writes(tmp_path: Path) -> None:
    CompileCache(tmp_path, is_main=False).save()
    CompileCache(None, is_main=True).save()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"torn" * 100])
def test_a_damaged_file_costs_a_compilation_and_not_the_run(tmp_path: Path, content: bytes) -> None:
    (tmp_path / COMPILE_CACHE_FILE).write_bytes(content)
    CompileCache(tmp_path, is_main=False).load()
    assert (tmp_path / COMPILE_CACHE_FILE).read_bytes() == content  # the main rank replaces it, once it has compiled
