"""`pomscale bench inception`: pictures per second of the extractor `inception` beside torch-fidelity's.

Both read the same PNGs and the same weights file, with random values, in one process of as many threads each; they are
measured in turns, since the speed of a shared machine drifts.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pomscale.base.errors import InputError
from pomscale.benchmarks import torch_fidelity_rival
from pomscale.benchmarks.report import BenchReport
from pomscale.codecs.extractors import Extractor, build_extractor
from pomscale.codecs.extractors.inception_network import InceptionNetwork

_SIZE = 256
_BATCH = 64
_WANTED = 1.3
_TOLERANCE = 1e-4  # relative, of the mean of all features


def bench_inception(*, rival: Path, num_pictures: int, num_turns: int, num_threads: int) -> BenchReport:
    """Measure both extractors.

    Args:
        rival: Python interpreter of an environment with torch-fidelity.
        num_pictures: Number of PNGs of 256x256.
        num_turns: Turns of each; the fastest counts.
        num_threads: Threads of each.

    Raises:
        InputError: The interpreter cannot run torch-fidelity.
    """
    report = BenchReport("inception")
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="pomscale-bench-") as scratch:
        folder, weights = Path(scratch) / "pictures", Path(scratch) / "weights.pth"
        _write_pictures(folder, num_pictures)
        _write_weights(weights)
        torch.set_num_threads(num_threads)
        try:
            ours = build_extractor(f"inception:{weights}")
            _measure(report, ours, folder, _start(rival, weights, folder, num_threads), num_turns)
        finally:
            torch.set_num_threads(before)
    return report


def _measure(report: BenchReport, ours: Extractor, folder: Path, theirs: subprocess.Popen[str], num_turns: int) -> None:
    count = len(list(folder.iterdir()))
    found: dict[str, list[dict[str, Any]]] = {"torch-fidelity": [], "pomscale": []}
    with theirs:
        for _ in range(num_turns):
            found["torch-fidelity"].append(_ask(theirs))
            found["pomscale"].append(_extract(ours, folder))
    seconds = {name: min(turn["seconds"] for turn in turns) for name, turns in found.items()}
    for name, least in seconds.items():
        turns = [round(turn["seconds"], 2) for turn in found[name]]
        report.add(f"features of {count} pictures, {name}", pictures_per_s=count / least, turns_s=turns)
    for feature, expected in found["torch-fidelity"][0]["means"].items():
        value = found["pomscale"][0]["means"][feature]
        if abs(value - expected) > _TOLERANCE * abs(expected):
            report.failures.append(f"the mean of {feature} is {value}, and torch-fidelity's {expected}")
    report.compare("speed beside torch-fidelity", seconds["torch-fidelity"] / seconds["pomscale"], _WANTED)


def _extract(extractor: Extractor, folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    parts = []
    files = sorted(folder.glob("*.png"))
    for first in range(0, len(files), _BATCH):
        pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files[first : first + _BATCH]]
        media = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        parts.append(extractor.extract(media, ("pooled", "logits")))
    seconds = time.perf_counter() - start
    pooled, logits = (torch.cat([part[name] for part in parts]).double().mean() for name in ("pooled", "logits"))
    return {"seconds": seconds, "means": {"2048": float(pooled), "logits_unbiased": float(logits)}}


def _start(rival: Path, weights: Path, folder: Path, num_threads: int) -> subprocess.Popen[str]:
    """Start the rival and wait until it is ready."""
    command = [str(rival), torch_fidelity_rival.__file__, str(weights), str(folder), str(num_threads)]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise InputError(f"--rival: {rival} cannot be started ({error})") from error
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        process.wait()
        raise InputError(f"--rival: {rival} has no torch-fidelity: pip install torch-fidelity==0.4.0 torchvision there")
    return process


def _ask(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("once\n")
    process.stdin.flush()
    return dict(json.loads(process.stdout.readline()))


def _write_pictures(folder: Path, count: int) -> None:
    """Write PNGs of smooth noise, which decode as fast as photographs do."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        coarse.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.png")


def _write_weights(file: Path) -> None:
    with torch.device("meta"):
        shapes = InceptionNetwork().file_shapes()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            tensors[name] = torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
        else:
            tensors[name] = torch.ones(shape) if name.endswith(("bn.weight", "running_var")) else torch.zeros(shape)
    torch.save(tensors, file)
