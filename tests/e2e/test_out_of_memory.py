"""Memory that really runs out, in a process of its own."""

from __future__ import annotations

import sys

from support.paths import RECIPES
from support.running import run

PROGRAM = """
import resource, sys
import numpy, psutil, torch
from pomscale.config.load import load_train_recipe
from pomscale.engine.out_of_memory import explained_out_of_memory
from pomscale.base.errors import PomscaleError

recipe = load_train_recipe(sys.argv[1], ["training.micro_batch=8"])
limit = psutil.Process().memory_info().vms + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resident = {"parameters": 2**30, "optimizer": 2**31, "ema": 0}
too_large = {
    "tensor": lambda: torch.empty(2**31),
    "batch": lambda: torch.ones(2**14, 1).mm(torch.ones(1, 2**16)),
    "numpy": lambda: numpy.empty(2**31),
    "python": lambda: bytearray(2**33),
}
for what, allocate in too_large.items():
    try:
        with explained_out_of_memory(recipe, torch.device("cpu"), lambda: resident):
            allocate()
    except PomscaleError as error:
        print(what, error)
try:
    with explained_out_of_memory(recipe, torch.device("cpu"), dict):
        torch.ones(2).mm(torch.ones(3))
except RuntimeError as error:
    print("other", type(error).__name__)
"""


def test_what_was_asked_what_was_there_what_to_change() -> None:
    command = [sys.executable, "-c", PROGRAM, str(RECIPES / "quickstart.yaml")]
    done = run(command)
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert list(told) == ["tensor", "batch", "numpy", "python", "other"]
    assert told.pop("other") == "RuntimeError"
    for error in told.values():
        assert error.startswith("out of memory: ")
        assert "Resident: parameters 1.00 GiB, optimizer 2.00 GiB, ema 0.00 GiB; this process " in error
        assert "cheapest first: training.micro_batch=4; compute.activation_checkpointing=selective|full; " in error
    assert "you tried to allocate 8589934592 bytes" in told["tensor"]
    assert "you tried to allocate 4294967296 bytes" in told["batch"]
    assert "Unable to allocate 16.0 GiB" in told["numpy"]
