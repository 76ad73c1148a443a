"""`pomscale bench images`: cost of `evaluate images` beside its network's, in two processes, and in memory.

With an interpreter that has torch-fidelity, also beside that: features alone, and whole evaluations of the same PNGs,
whose metrics are compared.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pomscale.base.errors import PomscaleError
from pomscale.benchmarks.beside_torch_fidelity import (
    Rival,
    compare_evaluations,
    compare_features,
    write_pictures,
    write_weights,
)
from pomscale.benchmarks.memory import peak_private_mib
from pomscale.benchmarks.report import BenchReport
from pomscale.config.load import load_train_recipe
from pomscale.config.model import ImageModelConfig
from pomscale.evaluation.generated.evaluate import evaluate
from pomscale.evaluation.generated.evaluation import Evaluation
from pomscale.evaluation.generated.generated_pictures import Drawing
from pomscale.evaluation.generated.opening import Opening
from pomscale.evaluation.generated.request import Request
from pomscale.models import DiPoM, init_weights
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.load import PretrainedDiPoM
from pomscale.pretrained.weights import write_weights as write_exported

_MOST_OVERHEAD, _LEAST_SCALING, _MOST_GROWTH = 0.03, 1.9, 1.05
_REFERENCE_WAVES = 20  # other pictures than the source's: KID of the same kind is 0, of which float32 has no digit
_SCALING_ROUNDS = 3
_SCALING_PART = 16
_FEW, _MANY = 5_000, 50_000
_SMALL = 16  # pixels of a side, where memory is measured


def bench_images(*, rival: Path | None, num_pictures: int, num_turns: int, num_threads: int) -> BenchReport:
    """Measure evaluations of pictures.

    Args:
        rival: Python interpreter of an environment with torch-fidelity; None = leave out what is beside it.
        num_pictures: Number of PNGs of 256x256 on each side, and of digits that a model draws.
        num_turns: Turns beside the rival; the fastest counts.
        num_threads: Threads of each, beside the rival.

    Raises:
        InputError: The interpreter cannot run torch-fidelity.
        PomscaleError: An evaluation failed.
    """
    report = BenchReport("images")
    with tempfile.TemporaryDirectory(prefix="pomscale-bench-") as scratch:
        folder = Path(scratch)
        _overhead(report, folder, num_pictures)
        weights = write_weights(folder / "weights.pth")
        pictures = write_pictures(folder / "pictures", num_pictures)
        if rival is None:
            report.note("without --rival, nothing is measured beside torch-fidelity")
        else:
            reference = write_pictures(folder / "reference", num_pictures, _REFERENCE_WAVES)
            with contextlib.closing(Rival(rival, weights, num_threads)) as theirs, _threads(num_threads):
                compare_features(report, theirs, weights, pictures, num_turns)
                compare_evaluations(report, theirs, weights, (pictures, reference), num_turns)
        _scaling(report, folder, weights, pictures)
        _memory(report, folder)
    return report


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _overhead(report: BenchReport, folder: Path, num_pictures: int) -> None:
    """Measure the share of an evaluation's processor time, one thread, that is not in the network that draws.

    The extractor's own network counts as overhead here.
    """
    model = _untrained(folder / "model")
    drawing = Drawing(num=num_pictures, changes={"num_steps": 25, "guidance": 1.0})
    opening = Opening(drawing=drawing)
    request = Request(
        str(model), None, ("digits",), metrics=("inception_score",), opening=opening, work=folder / "work"
    )
    with _threads(1):
        evaluation = Evaluation(request)
        with _network_seconds() as in_network:
            start = time.process_time()
            evaluate(evaluation, progress=False)
            whole = time.process_time() - start
    share = 1 - sum(in_network) / whole
    report.add(f"{num_pictures} digits drawn and measured", processor_s=whole, in_network_s=sum(in_network))
    report.compare("share outside of the network that draws", share, _MOST_OVERHEAD, at_least=False)


@contextlib.contextmanager
def _network_seconds() -> Iterator[list[float]]:
    """Yield a list that receives the processor seconds of each call of a DiPoM."""
    found: list[float] = []
    begun: list[float] = []

    def before(module: nn.Module, _: object) -> None:
        if isinstance(module, DiPoM):
            begun.append(time.process_time())

    def after(module: nn.Module, *_: object) -> None:
        if isinstance(module, DiPoM):
            found.append(time.process_time() - begun.pop())

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(before),
        nn.modules.module.register_module_forward_hook(after),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _untrained(folder: Path) -> Path:
    """Export the quickstart's network as it is before training."""
    recipe = load_train_recipe("quickstart")
    assert isinstance(recipe.model, ImageModelConfig)
    channels = recipe.model.latent_shape[0]
    card = ModelCard(
        model=recipe.model,
        diffusion=recipe.diffusion,
        sampling=recipe.sampling,
        codec=recipe.codec,
        codec_identity=None,
        class_names=(),
        latent_mean=(0.0,) * channels,
        latent_std=(1.0,) * channels,
        averages=(),
    )
    network = PretrainedDiPoM(card)
    init_weights(network, recipe.seed)
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    write_exported(folder, card, {"weights": "model"}, shapes, {"model": parameters.values()})
    return folder


def _scaling(report: BenchReport, folder: Path, weights: Path, pictures: Path) -> None:
    """Measure processes of one thread that share the parts of one evaluation, each on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        report.note("two processes are not measured: this machine has one core")
        return
    rates: dict[int, list[float]] = {1: [], 2: []}
    count = len(list(pictures.iterdir()))
    for number in range(_SCALING_ROUNDS):
        for num_tasks, found in rates.items():
            work = folder / f"scaling-{number}-{num_tasks}"
            found.append(count / _seconds_together(work, weights, pictures, cores[:num_tasks]))
    for num_tasks, found in rates.items():
        report.add(f"inception score and statistics, {num_tasks} process(es), a core each", pictures_per_s=found)
    ratios = [two / one for one, two in zip(*rates.values(), strict=True)]
    report.compare("two processes over one", statistics.median(ratios), _LEAST_SCALING)


def _seconds_together(work: Path, weights: Path, pictures: Path, cores: list[int]) -> float:
    """Return the seconds from the first process's first part to the last one's end."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PINNED, str(core), f"{index}/{len(cores)}", *map(str, (work, weights, pictures))],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index, core in enumerate(cores)
    ]
    spans = [process.communicate()[0].split() for process in processes]
    if any(process.returncode for process in processes):
        raise PomscaleError("an evaluation of the benchmark failed: no figure")
    return max(float(end) for _, end in spans) - min(float(begin) for begin, _ in spans)


_PINNED = f"""
import os, sys, time
from pathlib import Path
core, task, work, weights, pictures = sys.argv[1:]
os.sched_setaffinity(0, {{int(core)}})
from pomscale.base.task_index import this_task
from pomscale.evaluation.generated.evaluate import evaluate
from pomscale.evaluation.generated.evaluation import Evaluation
from pomscale.evaluation.generated.request import Outputs, Request
outputs = Outputs(statistics=Path(work + ".npz"))
request = Request(pictures, None, ("inception:" + weights,), metrics=("inception_score",), part={_SCALING_PART},
                  batch={_SCALING_PART}, outputs=outputs, work=Path(work))
evaluation = Evaluation(request)
Path(work + task.replace("/", "-")).touch()
while len(list(Path(work).parent.glob(Path(work).name + "[0-9]*-*"))) < int(task.split("/")[1]):
    time.sleep(0.01)
begin = time.time()
evaluate(evaluation, this_task(task), progress=False)
print(begin, time.time())
"""


def _memory(report: BenchReport, folder: Path) -> None:
    """Measure the peak of evaluations of few and many pictures that keep statistics alone."""
    peaks = {}
    for count in (_FEW, _MANY):
        file = folder / f"{count}.npz"
        np.savez(file, np.random.default_rng(0).integers(0, 256, (count, _SMALL, _SMALL, 3), dtype=np.uint8))
        peaks[count] = peak_private_mib(_FID, str(file), str(folder / f"memory-{count}"))
        report.add(f"FID of {count:,} pictures of {_SMALL}x{_SMALL}", peak_private_mib=peaks[count])
    report.compare(f"peak at {_MANY:,} over {_FEW:,}", peaks[_MANY] / peaks[_FEW], _MOST_GROWTH, at_least=False)


_FID = """
import sys
from pathlib import Path
from pomscale.evaluation.generated.evaluate import evaluate
from pomscale.evaluation.generated.evaluation import Evaluation
from pomscale.evaluation.generated.request import Request
file, work = sys.argv[1:]
evaluate(Evaluation(Request(file, file, ("pixels",), metrics=("fid",), work=Path(work))), progress=False)
"""
