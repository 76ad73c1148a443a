"""`pomscale bench encode`: overhead of the pipeline over its network, scaling over tasks, growth of memory, decoding.

- Overhead: pictures on disk through `encode` (decoding, writing, checksums, fsync), against a bare loop of the same
  VAE over tensors that lie in memory.
- Scaling: a decode-bound encode by two tasks on one output, each pinned to a core, against one task on one core.
- Memory: peak private memory of an encode of many items against that of few.
- Decoding of clips: ranges of a long file, and files on two cores (`decode`).
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipelines.encode.encode import encode
from pomscale.base.errors import PomscaleError
from pomscale.benchmarks.memory import peak_private_mib
from pomscale.benchmarks.report import BenchReport
from pomscale.benchmarks.synthetic import table_recipe
from pomscale.codecs import Codec, build_codec
from pomscale.config.encode import EncodeRecipe
from pomscale.runs.layout import METRICS_FILE

_SIZE = 128
_NUM_ROUNDS = 3  # rivals are measured in turns, since the speed of a shared machine drifts by more than they differ


def bench_encode(*, num_pictures: int, num_items: int, num_clips: int) -> BenchReport:
    """Measure overhead, scaling, memory and decoding of clips, each where its number is not 0.

    Args:
        num_pictures: number of JPEG files for overhead and scaling.
        num_items: rows of the large table for memory.
        num_clips: number of clips that are decoded.
    """
    report = BenchReport("encode")
    with tempfile.TemporaryDirectory(prefix="pomscale-bench-") as temporary:
        folder = Path(temporary)
        if num_pictures:
            _write_pictures(folder / "pictures", num_pictures)
            _overhead(report, folder, num_pictures)
            _scaling(report, folder, num_pictures)
        if num_items:
            _memory(report, folder, num_items)
        if num_clips:
            from pomscale.benchmarks.decode import bench_decode  # noqa: PLC0415  PyAV is optional

            bench_decode(report, folder, num_clips=num_clips, num_turns=_NUM_ROUNDS)
    return report


def _write_pictures(folder: Path, count: int) -> None:
    """Write JPEGs of 500x375, ImageNet's usual size: smooth noise, which compresses as photographs do."""
    rng = np.random.default_rng(0)
    for number in range(count):
        target = folder / f"class-{number % 4}" / f"{number:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(target, quality=90)


def _recipe(folder: Path, name: str, **changes: Any) -> EncodeRecipe:
    values: dict[str, Any] = {
        "kind": "encode",
        "name": name,
        "output": str(folder / name),
        "source": {"kind": "image_folder", "path": str(folder / "pictures")},
        "codec": {"name": "pixel"},
        "transform": {"size": _SIZE},
        "shard_samples": 64,
        "batch": 8,
        "num_workers": 1,
        "device": "auto",
    }
    return EncodeRecipe.model_validate(values | changes)


def _save_vae(folder: Path) -> Path:
    """Save an AutoencoderKL of Stable Diffusion's shape at a quarter of its width: minutes, not hours, on a CPU."""
    from diffusers import AutoencoderKL  # noqa: PLC0415  optional, and seconds to import

    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
        sample_size=_SIZE,
    )
    vae.save_pretrained(folder / "vae")
    return folder / "vae"


def _overhead(report: BenchReport, folder: Path, count: int) -> None:
    codec_values = {"name": "vae", "path": str(_save_vae(folder)), "store": "moments"}
    recipes = [_recipe(folder, f"overhead-{number}", codec=codec_values) for number in range(_NUM_ROUNDS)]
    assert recipes[0].codec is not None
    codec = build_codec(recipes[0].codec)
    _bare_loop(codec, recipes[0].batch, recipes[0].batch)  # warm-up
    bare, ours, busy = [_bare_loop(codec, recipes[0].batch, count)], [], []
    for recipe in recipes:
        done = encode(recipe, progress=False)
        if done.datasets[0].num_samples != count:
            raise PomscaleError(f"the encode made {done.datasets[0].num_samples} of {count} samples: no figure")
        ours.append(done.items_per_s)  # its clock starts with the first item, so loading the VAE counts for neither
        busy.append(done.busy_share)
        bare.append(_bare_loop(codec, recipe.batch, count))
    report.add("bare loop of the VAE over tensors in memory", images_per_s=bare, threads=torch.get_num_threads())
    report.add("pomscale data encode, JPEG 500x375 on disk", images_per_s=ours, encoder_busy=min(busy))
    around = [(before + after) / 2 for before, after in itertools.pairwise(bare)]
    overheads = [rival / our - 1.0 for rival, our in zip(around, ours, strict=True)]
    report.compare("pipeline overhead over the bare loop", statistics.median(overheads), 0.10, at_least=False)


def _bare_loop(codec: Codec, batch: int, count: int) -> float:
    """Return the pictures per second of a loop over tensors in memory."""
    images = torch.rand(batch, 3, _SIZE, _SIZE)
    start = time.perf_counter()
    for _ in range(count // batch):
        codec.encode(images)
    return count // batch * batch / (time.perf_counter() - start)


def _scaling(report: BenchReport, folder: Path, count: int) -> None:
    """Measure real processes, as an array of tasks would be, each on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        report.verdicts.append("scaling: this machine has one core")
        return
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(_NUM_ROUNDS):
        for num_tasks, found in rates.items():
            found.append(_pinned_rate(folder, f"scaling-{number}-{num_tasks}", cores[:num_tasks], count))
    for num_tasks, found in rates.items():
        report.add(f"decode-bound encode, {num_tasks} task(s), a core each", images_per_s=found)
    ratios = [two / one for one, two in zip(*rates.values(), strict=True)]
    report.compare("two tasks over one", statistics.median(ratios), 1.6)


def _pinned_rate(folder: Path, name: str, cores: list[int], count: int) -> float:
    """Return the pictures per second of one task on each of `cores`."""
    recipe = _recipe(folder, name, shard_samples=32)
    path = folder / f"{name}.yaml"
    path.write_text(recipe.model_dump_json(), encoding="utf-8")  # JSON is YAML
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PINNED, str(core), str(path), f"{index}/{len(cores)}"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for index, core in enumerate(cores)
    ]
    if any([process.wait() for process in processes]):
        raise PomscaleError("an encode of the benchmark failed: no figure")
    spans = [_span(Path(recipe.output), index) for index in range(len(cores))]
    return count / (max(end for _, end in spans) - min(start for start, _ in spans))


_PINNED = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
from pomscale.cli import main
main(["data", "encode", sys.argv[2], "--task", sys.argv[3]])
"""


def _span(output: Path, task: int) -> tuple[float, float]:
    """Return when a task began with its items, after imports, and when it was done, by its last row of metrics."""
    lines = (output / "parts" / f"task-{task:05d}" / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[-1])
    return row["time_unix_s"] - row["encode/seconds"], row["time_unix_s"]


def _memory(report: BenchReport, folder: Path, num_items: int) -> None:
    peaks = {}
    for count in (min(10_000, num_items), num_items):
        recipe = table_recipe(folder, f"memory-{count}", count, side=8, flip=False, shard_samples=4096)
        path = folder / f"memory-{count}.yaml"
        path.write_text(recipe.model_dump_json(), encoding="utf-8")
        peaks[count] = peak_private_mib(_ENCODE, str(path))
        report.add(f"encode of {count:,} items", peak_private_mib=peaks[count])
    few, many = min(peaks), max(peaks)
    report.compare(f"peak memory at {many:,} items over {few:,}", peaks[many] / peaks[few], 1.1, at_least=False)


_ENCODE = """
import sys
from data_pipelines.encode.encode import encode
from pomscale.config.load import load_encode_recipe
encode(load_encode_recipe(sys.argv[1]), progress=False)
"""
