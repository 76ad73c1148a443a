"""`pomscale train` with faults in it: faulty_train.py FAULTS RECIPE [a.b=c ...]; FAULTS is a JSON list of

{"missing": "deepspeed"}                                      the package is not installed
{"close_timeout_s": 120}                                      so long wandb may take to write out what is left
{"factor": "nan", "positions": [160, 192]}                    samples at these global positions weigh so much more
{"do": "sleep", "at": "step", "nth": 3, "rank": 1, ...}       on that rank, just before the third step of this process

at: "step"; "validation" (just before it); or "commit": when the thread that writes a checkpoint is about to commit it.
do: a function below, which is given the rest of the fault, and the arguments of what it comes before.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pomscale.checkpoint.store
import pomscale.monitoring.monitor
import pomscale.training.build
import pomscale.training.periodic
from pomscale.checkpoint.store import complete_checkpoints
from pomscale.cli import main
from pomscale.config.train import TrainRecipe
from pomscale.data.loader import MicroBatch
from pomscale.distributed.watchdog import Watchdog
from pomscale.shards.schema import TextInfo
from pomscale.training.loss import TrainBatch

RANK = int(os.environ.get("RANK", "0"))
HOOKS = {
    "step": (pomscale.training.build, "share_of_loss"),
    "validation": (pomscale.training.periodic, "heldout_loss"),
    "commit": (pomscale.checkpoint.store, "seal"),
}


def sleep(*_: Any) -> None:
    time.sleep(10_000)


def hold_the_lock(*_: Any) -> None:
    """A deadlock in C, which no signal interrupts; PyDLL keeps Python's own lock during the calls."""
    mutex = ctypes.create_string_buffer(64)
    ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    ctypes.PyDLL(None).pthread_mutex_lock(mutex)


def allocate(*_: Any) -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


def send(*_: Any, number: str, after_s: float = 0.0, to_group: bool = False, then_wait_s: float = 0.0) -> None:
    """A signal to this process, or, as schedulers do, to all processes of its group; at once, or a little later."""
    target, how = (os.getpgrp(), os.killpg) if to_group else (os.getpid(), os.kill)
    if after_s:
        threading.Timer(after_s, how, (target, signal.Signals[number])).start()
    elif to_group:
        how(target, signal.Signals[number])
    else:  # to this very thread: SIGSTOP would reach it later by way of another, and a save go on meanwhile
        signal.pthread_kill(threading.get_ident(), signal.Signals[number])
    for _ in range(round(then_wait_s / 0.1)):  # in pieces, of which a standstill of the whole process costs but one
        time.sleep(0.1)


def expect_a_hang(*_: Any, within_s: float) -> None:
    """Set a short timeout from here on; before this step a busy machine may stand still for longer."""
    (watchdog,) = (found for found in gc.get_objects() if isinstance(found, Watchdog))
    watchdog.beat()
    watchdog._timeout_s, watchdog._look_every_s = within_s, within_s / 20
    watchdog._arm()


def flip_a_bit(*arguments: Any, parameter: str) -> None:
    model = next(argument for argument in arguments if isinstance(argument, nn.Module))
    local = model.get_parameter(parameter).detach().to_local()  # type: ignore[operator]  # a DTensor
    local.view(torch.int32).flatten()[0] ^= 1 << 12


def damage_the_newest_checkpoint(*_: Any, root: str) -> None:
    (shard,) = complete_checkpoints(Path(root))[-1].glob("__0_*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def inject(fault: dict[str, Any]) -> None:
    if "missing" in fault:
        # Importing it raises ImportError; parts of it may be here already, imported by another package.
        for name in {fault["missing"], *(name for name in sys.modules if name.startswith(f"{fault['missing']}."))}:
            sys.modules[name] = None  # type: ignore[assignment]
    elif "close_timeout_s" in fault:
        pomscale.monitoring.monitor.CLOSE_TIMEOUT_S = fault["close_timeout_s"]
    elif "factor" in fault:
        change_weights(float(fault["factor"]), *fault["positions"])
    elif fault.pop("rank", RANK) == RANK:
        inject_before(**fault)


def change_weights(factor: float, begin: int, end: int) -> None:
    draw_batch = pomscale.training.build.draw_batch

    def with_other_weights(recipe: TrainRecipe, batch: MicroBatch, texts: TextInfo | None) -> TrainBatch:
        drawn = draw_batch(recipe, batch, texts)
        drawn.weights[(batch.positions >= begin) & (batch.positions < end)] *= factor
        return drawn

    pomscale.training.build.draw_batch = with_other_weights


def inject_before(do: str, at: str, nth: int, **options: Any) -> None:
    module, name = HOOKS[at]
    right: Callable[..., Any] = getattr(module, name)
    calls = itertools.count(1)

    def faulty(*arguments: Any) -> Any:
        if next(calls) != nth:
            return right(*arguments)
        if do == "make_the_loss_infinite":
            return right(*arguments) + torch.inf
        globals()[do](*arguments, **options)
        return right(*arguments)

    setattr(module, name, faulty)


if __name__ == "__main__":
    for each in json.loads(sys.argv[1]):
        inject(each)
    main(["train", *sys.argv[2:]])
