"""Rows of `pomscale bench loader` on pixels: pictures per second beside a Pillow loop, as other trainers have it.

The loop is that of JiT, DiT and their kin: torch's DataLoader with two processes, each of which opens a JPEG, crops it
as ADM does, flips it by chance, and makes a tensor of it. Ours reads the same pictures from shards, with two threads.
Both give batches of (64, 3, 256, 256) uint8, all from the page cache.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data_pipelines.encode.encode import encode
from pomscale.base.errors import InputError, PomscaleError
from pomscale.benchmarks.report import BenchReport
from pomscale.config.data import DataConfig
from pomscale.config.encode import EncodeRecipe
from pomscale.data.loader import Loader, MicroBatch, ReadAhead
from pomscale.data.mixture import Mixture
from pomscale.shards.schema import read_manifest

_SIDE = 256
_BATCH = 64
_WARM_UP_BATCHES = 8
_NUM_READERS = 2
_NUM_ROUNDS = 3  # rivals are measured in turns, since the speed of a shared machine drifts
_LEAST = {"raw": 20.0, "png": 4.0}
_RIVAL = "Pillow loop"


def bench_pixels(report: BenchReport, root: Path, num_pictures: int, seconds: float) -> None:
    """Measure the loader on pixels, raw and as PNG, beside the Pillow loop.

    Args:
        report: The report that receives the rows.
        root: Folder for pictures and datasets.
        num_pictures: Number of JPEG files.
        seconds: Duration of each measurement.
    """
    pictures = root / f"photographs-{num_pictures}"
    if not pictures.exists():
        _write_photographs(pictures, num_pictures)
    paths = {_RIVAL: pictures, **{coding: _dataset(root, pictures, coding) for coding in _LEAST}}
    for coding in _LEAST:
        _check(pictures, paths[coding])
    rates: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(_NUM_ROUNDS):
        for name, path in paths.items():
            rates[name].append(_measure(name, path, seconds))
    rates[_RIVAL].append(_measure(_RIVAL, pictures, seconds))
    for name, path in paths.items():
        size = np.mean([file.stat().st_size for file in path.rglob("*.jpg")]) if name == _RIVAL else _bytes_each(path)
        label = f"{_RIVAL}, JPEG, 2 processes" if name == _RIVAL else f"pomscale, pixels {name}, 2 threads"
        report.add(label, pictures_per_s=rates[name], bytes_per_picture=float(size))
    around = [(before + after) / 2 for before, after in pairwise(rates[_RIVAL])]
    for coding, least in _LEAST.items():
        ratios = [ours / rival for ours, rival in zip(rates[coding], around, strict=True)]
        report.compare(f"pixels {coding} over the Pillow loop", statistics.median(ratios), least)


def _write_photographs(folder: Path, count: int) -> None:
    """Write JPEGs of 500x375, ImageNet's usual size: random parts of the two photographs that scikit-learn has."""
    try:
        from sklearn.datasets import load_sample_images  # noqa: PLC0415  optional
    except ImportError as error:
        raise InputError(
            f"photographs come with the package scikit-learn: {error}. Run: pip install -e '.[quickstart]'"
        ) from error
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(count):
        image = photographs[number % len(photographs)]
        width = rng.uniform(0.6, 1.0) * min(image.width, image.height * 4 / 3)
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - width * 3 / 4)
        box = (left, top, left + width, top + width * 3 / 4)
        target = folder / f"class-{number % 4}" / f"{number:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.resize((500, 375), Image.Resampling.BICUBIC, box).save(target, quality=95)


def _dataset(root: Path, pictures: Path, coding: str) -> Path:
    output = root / f"{pictures.name}-{coding}"
    if not (output / "manifest.json").exists():
        recipe = EncodeRecipe.model_validate(
            {
                "kind": "encode",
                "name": output.name,
                "output": str(output),
                "source": {"kind": "image_folder", "path": str(pictures)},
                "codec": {"name": "uint8", "coding": coding},
                "transform": {"size": _SIDE, "filter": "adm", "flip": True},
                "shard_samples": 256,
                "device": "cpu",
            }
        )
        encode(recipe)
    return output


def _bytes_each(dataset: Path) -> float:
    manifest = read_manifest(dataset)
    return sum(shard.num_bytes for shard in manifest.shards) / manifest.num_samples


# -- the rivals --------------------------------------------------------------------------------------------------------


class _PillowLoop(Dataset[tuple[torch.Tensor, int]]):
    """Pictures from files, as in JiT: RGB, ADM's crop, a flip by chance, torchvision's PILToTensor."""

    def __init__(self, pictures: Path) -> None:
        self.paths = sorted(pictures.rglob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        image = self.cropped(number)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), number % 4

    def cropped(self, number: int) -> Image.Image:
        with open(self.paths[number], "rb") as file:
            image: Image.Image = Image.open(file).convert("RGB")
        while min(image.size) >= 2 * _SIDE:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = _SIDE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - _SIDE) // 2, (image.height - _SIDE) // 2
        return image.crop((left, top, left + _SIDE, top + _SIDE))


def _pillow_batches(pictures: Path) -> Iterator[Any]:
    loader = DataLoader(
        _PillowLoop(pictures), _BATCH, shuffle=True, num_workers=_NUM_READERS, drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader


def _open(dataset: Path) -> Loader[MicroBatch]:
    config = DataConfig(path=str(dataset), num_threads=_NUM_READERS)
    return Loader(
        Mixture.open(config, seed=0, global_batch=_BATCH, read_text=False),
        micro_batch=None,
        rank=0,
        world_size=1,
        start_position=0,
        ahead=ReadAhead(_NUM_READERS, config.prefetch),
        finish=lambda batch: batch,
    )


def _check(pictures: Path, dataset: Path) -> None:
    """Compare an epoch with the pixels of the loop; a loader that reads something else gets no figure."""
    loop = _PillowLoop(pictures)
    originals = {np.asarray(loop.cropped(number)).transpose(2, 0, 1).tobytes() for number in range(len(loop))}
    seen: Counter[bytes] = Counter()
    with _open(dataset) as loader:
        while seen.total() < len(loop):
            for pixels in next(loader).latents.numpy()[: len(loop) - seen.total()]:
                as_stored = pixels.tobytes()
                seen[as_stored if as_stored in originals else pixels[..., ::-1].tobytes()] += 1
    if seen.keys() != originals:
        raise PomscaleError(f"{dataset}: an epoch is not the pictures of the Pillow loop: no figure")


def _measure(name: str, path: Path, seconds: float) -> float:
    """Measure in a process of its own, with one thread of computation, as a worker of a training process has."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ONE_READER, name, str(path), str(seconds)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rate: float = json.loads(done.stdout.splitlines()[-1])
    return rate


_ONE_READER = """
import os, sys
from pathlib import Path
from pomscale.benchmarks.pixel_loader import pictures_per_s
print(pictures_per_s(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])), flush=True)
os._exit(0)  # worker processes are not waited for
"""


def pictures_per_s(name: str, path: Path, seconds: float) -> float:
    """Return the pictures per second of one reader over about `seconds`, after a warm-up."""
    batches: Iterator[Any] = _pillow_batches(path) if name == _RIVAL else _open(path)
    for _ in range(_WARM_UP_BATCHES):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += _BATCH
    return count / (time.perf_counter() - start)
