"""`pomscale bench engine`: overhead of training over forward, backward and optimiser; averages; a cold start.

The trainer is run as users run it, in a process of its own that logs every step; its rival is a plain PyTorch loop over
the same model with the same batches already in memory. They take turns, so that both meet the same machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pomscale.base.errors import PomscaleError
from pomscale.benchmarks.report import BenchReport
from pomscale.benchmarks.synthetic import make_dataset
from pomscale.config.model import ImageModelConfig
from pomscale.engine.averages import Ema
from pomscale.models import DiPoM, init_weights
from pomscale.runs.layout import COMPILE_CACHE_FILE, EVENTS_FILE, METRICS_FILE

_SHAPE, _NUM_CLASSES = (4, 32, 32), 10
_WARM_UP_STEPS = 2


def bench_engine(*, batch: int, num_steps: int, num_turns: int, compile_start: bool) -> BenchReport:
    """Measure the trainer beside a plain loop.

    Args:
        batch: samples per step.
        num_steps: steps measured in each turn.
        num_turns: number of turns.
        compile_start: also measure cold starts, which takes minutes.
    """
    report = BenchReport("engine")
    with tempfile.TemporaryDirectory(prefix="pomscale-bench-") as temporary:
        folder = Path(temporary)
        dataset = make_dataset(folder, "set", 512, 64, flip=False, shard_samples=512)
        _overhead(report, folder, dataset, batch, num_steps, num_turns)
        _ema(report, batch)
        if compile_start:
            _starts(report, folder, dataset)
    return report


def _overhead(report: BenchReport, folder: Path, dataset: Path, batch: int, num_steps: int, num_turns: int) -> None:
    trainer, bare = [], []
    for turn in range(num_turns):
        trainer += _trainer_steps(folder, dataset, f"overhead-{turn}", batch, num_steps)
        bare += _in_a_process("bare_steps", batch, num_steps)
    times = {"trainer, DiPoM-S/2": statistics.median(trainer), "bare loop, DiPoM-S/2": statistics.median(bare)}
    for name, step_s in times.items():
        report.add(name, batch=batch, step_s=step_s, num_steps=num_steps * num_turns)
    ours, rival = times.values()
    report.compare("trainer overhead over the bare loop", ours / rival - 1, 0.03, at_least=False)


def _trainer_steps(folder: Path, dataset: Path, name: str, batch: int, num_steps: int) -> list[float]:
    """Return the seconds of each step but the first, as the run itself logs them."""
    total = batch * (_WARM_UP_STEPS + num_steps)
    _train(folder, dataset, name, f"training.total_samples={total}", f"training.global_batch={batch}")
    rows = [json.loads(line) for line in (folder / "runs" / name / METRICS_FILE).read_text().splitlines()]
    return [row["speed/step_time_s"] for row in rows if "speed/step_time_s" in row][_WARM_UP_STEPS:]


def _train(folder: Path, dataset: Path, name: str, *overrides: str, **environment: str) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
kind: train
name: bench
output: {folder}/runs
codec: {{name: pixel, channels: 1}}
data: {{path: {dataset}, normalization: dataset}}
model: {{preset: dipom-s-2, latent_shape: {list(_SHAPE)}, num_classes: {_NUM_CLASSES}}}
training: {{total_samples: 8, global_batch: 1}}
compute: {{precision: fp32, device: cpu}}
checkpoint: {{every_samples: 1000000}}
faults: {{preflight: false}}
monitoring: {{every_samples: 1, wandb: {{mode: disabled}}}}
""",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pomscale", "train", str(recipe), f"name={name}", *overrides]
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        raise PomscaleError(f"the trainer ended with {done.returncode}: {done.stdout.decode()[-2000:]}")


def bare_steps(batch: int, num_steps: int) -> list[float]:
    """Return the seconds of each step of a plain loop: forward, backward, clipping, fused AdamW, no averages."""
    values = {"preset": "dipom-s-2", "latent_shape": _SHAPE, "num_classes": _NUM_CLASSES}
    config = ImageModelConfig.model_validate(values)
    model = DiPoM(config)
    init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x0, eps = torch.randn(2, batch, *_SHAPE)
    t, condition = torch.rand(batch), torch.randint(_NUM_CLASSES, (batch,))
    seconds = []
    for _ in range(_WARM_UP_STEPS + num_steps):
        start_s = time.perf_counter()
        s = t.view(-1, 1, 1, 1)
        loss = (model((1 - s) * x0 + s * eps, t, condition) - (eps - x0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start_s)
    return seconds[_WARM_UP_STEPS:]


def ema_steps(batch: int, num_steps: int) -> list[float]:
    """Return the seconds of steps of DiPoM-B/2, and of updates of one average of its weights, measured in turns."""
    values = {"preset": "dipom-b-2", "latent_shape": _SHAPE, "num_classes": _NUM_CLASSES}
    config = ImageModelConfig.model_validate(values)
    model = DiPoM(config)
    init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ema = Ema(["average"], [p.detach() for p in model.parameters()])
    x, t, condition = torch.randn(batch, *_SHAPE), torch.rand(batch), torch.randint(_NUM_CLASSES, (batch,))
    seconds = []
    for _ in range(num_steps):
        start_s = time.perf_counter()
        model(x, t, condition).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        middle_s = time.perf_counter()
        ema.update({"average": 1e-4})
        seconds += [middle_s - start_s, time.perf_counter() - middle_s]
    return seconds


def _ema(report: BenchReport, batch: int) -> None:
    seconds = _in_a_process("ema_steps", batch, 3)
    step_s, update_s = statistics.median(seconds[0::2]), statistics.median(seconds[1::2])
    report.add("one average, DiPoM-B/2", batch=batch, update_s=update_s, step_s=step_s)
    report.compare("update of an average over a step", update_s / step_s, 0.05, at_least=False)


def _starts(report: BenchReport, folder: Path, dataset: Path) -> None:
    """Measure from the start of the process to the end of the first step, each time with an empty cache of the node."""
    first_start = _start_s(folder, dataset, folder / "node-0", 1)
    without = _start_s(folder, dataset, folder / "node-1", 2, forget=True)
    with_cache = _start_s(folder, dataset, folder / "node-2", 3)
    report.add("compiled, first start of a run", seconds=first_start)
    report.add("compiled, requeued to another node, cache file deleted", seconds=without)
    report.add("compiled, requeued to another node", seconds=with_cache)
    report.compare("start to first step, with the cache over without", with_cache / without, 1.0, at_least=False)


def _start_s(folder: Path, dataset: Path, node: Path, num_steps: int, *, forget: bool = False) -> float:
    run = folder / "runs" / "compiled"
    if forget:
        (run / COMPILE_CACHE_FILE).unlink()
    _train(
        folder,
        dataset,
        "compiled",
        f"training.total_samples={num_steps}",
        "compute.compile=true",
        "model.depth=2",
        TORCHINDUCTOR_CACHE_DIR=str(node),
    )
    events = [json.loads(line) for line in (run / EVENTS_FILE).read_text().splitlines()]
    newest = [event["seconds"] for event in events if "seconds" in event and event["incarnation"] == num_steps]
    return sum(seconds.get(kind, 0.0) for seconds in newest for kind in ("start_up", "compile"))


def _in_a_process(function: str, *arguments: int) -> list[float]:
    """Call a function of this module in a process of its own: memory left by one rival slows down the next."""
    code = (
        f"import json; from pomscale.benchmarks.engine import {function}; print(json.dumps({function}(*{arguments})))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    found: Any = json.loads(done.stdout.splitlines()[-1])
    return found
