"""`pomscale bench loader`: batches per second beside other readers of the same shards, and the time to resume.

Latents 4x32x32 float16 with flipped copies and classes, batch 256, warm page cache. Every reader shuffles, picks
original or flip, and collates; each is shown at every number of threads or processes tried, and compared at its best.
Pixels: see `pixel_loader`.
"""

from __future__ import annotations

import itertools
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset

from pomscale.base.errors import PomscaleError
from pomscale.benchmarks.memory import peak_private_mib
from pomscale.benchmarks.pixel_loader import bench_pixels
from pomscale.benchmarks.report import BenchReport
from pomscale.benchmarks.synthetic import make_dataset
from pomscale.config.data import DataConfig
from pomscale.data.loader import Loader, MicroBatch, ReadAhead
from pomscale.data.mixture import Mixture
from pomscale.shards.schema import read_manifest

_BATCH = 256
_SHAPE = (4, 32, 32)
_WARM_UP_BATCHES = 8
_SEED = 0


def bench_loader(
    *, num_samples: int, num_resume: int, num_pictures: int, seconds: float, folder: Path | None
) -> BenchReport:
    """Measure our loader beside other readers.

    Args:
        num_samples: samples of the set that is read; 0 = none.
        num_resume: samples of the set that is resumed, which has smaller latents; 0 = none.
        num_pictures: pictures of the sets of pixels; 0 = none.
        seconds: duration of each measurement.
        folder: folder that keeps the datasets for another time; None = a temporary one.
    """
    report = BenchReport("loader")
    with tempfile.TemporaryDirectory(prefix="pomscale-bench-") as temporary:
        root = folder or Path(temporary)
        if num_samples:
            _throughput(report, root, num_samples, seconds)
        if num_pictures:
            bench_pixels(report, root, num_pictures, seconds)
        if num_resume:
            large = _dataset(root, f"resume-{num_resume}", num_resume, side=8, flip=False, shard_samples=8192)
            _resume(report, large, num_resume, seconds)
            few = max(num_resume // 100, 1)
            small = _dataset(root, f"resume-{few}", few, side=8, flip=False, shard_samples=8192)
            _memory(report, {few: small, num_resume: large})
    return report


def _throughput(report: BenchReport, root: Path, num_samples: int, seconds: float) -> None:
    dataset = _dataset(root, f"loader-{num_samples}", num_samples, side=64, flip=True, shard_samples=2048)
    _check(dataset, num_samples)
    best = {
        name: max(_measure(report, dataset, name, setting, seconds) for setting in settings)
        for name, settings in _readers(dataset).items()
    }
    report.compare("pomscale over stock webdataset", best["pomscale"] / best["webdataset"], 10.0)
    report.compare("pomscale over the bare mmap reader", best["pomscale"] / best["bare mmap"], 0.5)
    if "energon" in best:
        report.compare("pomscale over Megatron-Energon", best["pomscale"] / best["energon"], 1.0)


def _dataset(root: Path, name: str, count: int, *, side: int, flip: bool, shard_samples: int) -> Path:
    if not (root / name / "manifest.json").exists():
        make_dataset(root, name, count, side, flip=flip, shard_samples=shard_samples)
    for shard in sorted((root / name).glob("*.tar")):  # this fills the page cache
        shard.read_bytes()
    return root / name


def _open(dataset: Path, num_threads: int, start: int = 0) -> Loader[Any]:
    config = DataConfig(path=str(dataset), num_threads=num_threads)
    mixture = Mixture.open(config, seed=_SEED, global_batch=_BATCH, read_text=False)
    return Loader(
        mixture,
        micro_batch=None,
        rank=0,
        world_size=1,
        start_position=start,
        ahead=ReadAhead(num_threads, config.prefetch),
        finish=lambda batch: batch,
    )


def _check(dataset: Path, count: int) -> None:
    """Compare one epoch with that of stock webdataset; a loader that reads something else gets no figure."""
    stock: Counter[tuple[bytes, int]] = Counter()
    original_of: dict[bytes, bytes] = {}
    for sample in webdataset.WebDataset(_shards(dataset), shardshuffle=False).decode():
        original = sample["latent.npy"].tobytes()
        original_of[original] = original_of[sample["latent_flip.npy"].tobytes()] = original
        stock[original, sample["cls"]] += 1
    ours: Counter[tuple[bytes, int]] = Counter()
    num_seen = 0
    with _open(dataset, 2) as loader:
        for batch in loader:
            here = min(
                len(batch.latents), count - num_seen
            )  # the last batch of the epoch holds samples of the next one
            latents = batch.latents[:here].numpy()
            labels = batch.condition[:here].tolist()
            ours.update((original_of[x.tobytes()], label) for x, label in zip(latents, labels, strict=True))
            num_seen += here
            if num_seen == count:
                break
    if ours != stock:
        raise PomscaleError("an epoch of the loader is not what stock webdataset reads from the shards: no figure")


def _shards(dataset: Path) -> list[str]:
    return [str(dataset / shard.name) for shard in read_manifest(dataset).shards]


def _measure(report: BenchReport, dataset: Path, name: str, setting: str, seconds: float) -> float:
    """Measure in a process of its own: memory left by one reader slows down the next."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ONE_READER, str(dataset), name, setting, str(seconds)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rate = float(done.stdout.split()[-1])
    report.add(f"{name}, {setting}", samples_per_s=rate)
    return rate


_ONE_READER = """
import os, sys
from pathlib import Path
from pomscale.benchmarks.loader import samples_per_s
print(samples_per_s(Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])), flush=True)
os._exit(0)  # worker processes are not waited for
"""


def samples_per_s(dataset: Path, name: str, setting: str, seconds: float) -> float:
    """Return the samples per second of one reader over about `seconds`, after a warm-up."""
    batches = iter(_readers(dataset)[name][setting]())
    for _ in range(_WARM_UP_BATCHES):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = next(batches)
        count += len(batch.latents if isinstance(batch, MicroBatch) else batch[0])
    return count / (time.perf_counter() - start)


def _readers(dataset: Path) -> dict[str, dict[str, Callable[[], Any]]]:
    shards = _shards(dataset)
    readers: dict[str, dict[str, Callable[[], Any]]] = {
        "bare mmap": {
            **{f"{n} thread(s)": partial(_threaded, _BareReader(dataset), n) for n in (1, 2, 3)},
            **{
                f"DataLoader, {n} process(es)": partial(DataLoader, _BareReader(dataset), None, num_workers=n)
                for n in (0, 1, 2)
            },
        },
        "webdataset": {
            **{f"DataLoader, {n} process(es)": partial(_stock_loader, shards, n) for n in (0, 1, 2)},
            **{f"batched, WebLoader, {n} process(es)": partial(_stock_batched, shards, n) for n in (0, 1, 2)},
        },
        "pomscale": {f"{n} thread(s)": partial(_open, dataset, n) for n in (1, 2, 3)},
    }
    energon = _energon(dataset)
    if energon is not None:
        readers["energon"] = energon
    return readers


def _stock(shards: list[str]) -> Any:
    """Read by webdataset as its documentation shows: shuffled shards, a buffer of samples, tuples, lazy decoding."""

    def pick(sample: dict[str, Any]) -> dict[str, Any]:
        array = "latent_flip.npy" if np.random.rand() < 0.5 else "latent.npy"
        return {"__key__": sample["__key__"], "npy": sample[array], "cls": sample["cls"]}

    stream = webdataset.WebDataset(shards * 50, shardshuffle=100).shuffle(1000).map(pick).decode()
    return stream.to_tuple("npy", "cls")


def _stock_loader(shards: list[str], num_workers: int) -> Any:
    return DataLoader(_stock(shards), _BATCH, num_workers=num_workers)


def _stock_batched(shards: list[str], num_workers: int) -> Any:
    return webdataset.WebLoader(_stock(shards).batched(_BATCH), batch_size=None, num_workers=num_workers)


class _BareReader(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Reader that does the least for random access: offsets, mmap and a copy, without checks or normalisation."""

    def __init__(self, dataset: Path) -> None:
        self._shards = _shards(dataset)
        self._index = np.load(dataset / "index.npy")
        self._header = int(self._index["latent_length"][0]) - 2 * int(np.prod(_SHAPE))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rng = np.random.default_rng()
        while True:
            yield self.batch(rng)

    def batch(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self._maps()
        rows = self._index[rng.integers(len(self._index), size=_BATCH)]
        flips = rng.random(_BATCH) < 0.5
        offsets = np.where(flips, rows["flip_offset"], rows["latent_offset"]) + self._header
        out = np.empty((_BATCH, *_SHAPE), np.float16)
        flat, size = out.reshape(-1).view(np.uint8).data, 2 * int(np.prod(_SHAPE))
        for i, (shard, offset) in enumerate(zip(rows["shard"].tolist(), offsets.tolist(), strict=True)):
            flat[i * size : (i + 1) * size] = maps[shard][offset : offset + size]
        return torch.from_numpy(out), torch.from_numpy(rows["label"].astype(np.int64))

    def _maps(self) -> list[memoryview]:
        if not hasattr(self, "_opened"):
            files = [open(shard, "rb") for shard in self._shards]  # noqa: SIM115
            self._opened = [memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) for file in files]
            for file in files:
                file.close()
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}


def _threaded(reader: _BareReader, num_threads: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    reader._maps()
    with ThreadPoolExecutor(num_threads) as pool:
        pending = [pool.submit(reader.batch, np.random.default_rng(i)) for i in range(num_threads + 2)]
        for number in itertools.count():
            yield pending.pop(0).result()
            pending.append(pool.submit(reader.batch, np.random.default_rng(number)))


def _energon(dataset: Path) -> dict[str, Callable[[], Any]] | None:
    """Import Megatron-Energon where it is installed; it is a rival, no dependency of ours."""
    try:
        from megatron import energon  # noqa: PLC0415
    except ImportError:
        return None
    return _energon_readers(energon, dataset)


def _energon_readers(energon: Any, dataset: Path) -> dict[str, Callable[[], Any]]:
    """Build a CrudeWebdataset with a cooker that picks original or flip, as its documentation shows for raw tars."""
    folder = dataset.with_name(f"{dataset.name}-energon")  # energon writes an index beside the tars
    if not (folder / ".nv-meta" / "dataset.yaml").exists():
        folder.mkdir(exist_ok=True)
        for shard in dataset.glob("*.tar"):
            (folder / shard.name).hardlink_to(shard)
        prepare = ["prepare", str(folder), "--non-interactive", "--split-ratio", "1,0,0", "--skip-dataset-yaml"]
        subprocess.run([sys.executable, "-m", "megatron.energon.cli.main", *prepare], check=True, stdout=sys.stderr)
        (folder / ".nv-meta" / "dataset.yaml").write_text(
            "__module__: megatron.energon\n__class__: CrudeWebdataset\n", encoding="utf-8"
        )

    @energon.stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        array = sample["latent_flip.npy" if np.random.rand() < 0.5 else "latent.npy"]
        kept = energon.basic_sample_keys(sample)
        return {**kept, "latent": torch.as_tensor(array), "label": int(sample["cls"])}

    class Task(energon.DefaultTaskEncoder):
        cookers = [energon.Cooker(cook)]  # noqa: RUF012

        def batch(self, samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
            labels = torch.tensor([sample["label"] for sample in samples])
            return torch.stack([sample["latent"] for sample in samples]), labels

    def make(num_workers: int) -> Any:
        worker = energon.WorkerConfig(rank=0, world_size=1, num_workers=num_workers)
        data = energon.get_train_dataset(
            folder,
            batch_size=_BATCH,
            shuffle_buffer_size=1000,
            max_samples_per_sequence=100,
            worker_config=worker,
            task_encoder=Task(),
        )
        return energon.get_loader(data)

    return {f"{n} process(es)": partial(make, n) for n in (0, 1, 2)}


def _resume(report: BenchReport, dataset: Path, count: int, seconds: float) -> None:
    """Measure the time to the first batch at the last tenth of an epoch, after all imports."""
    start = int(0.9 * count) // _BATCH * _BATCH
    began = time.perf_counter()
    with _open(dataset, 2, start) as loader:
        next(loader)
        ours = time.perf_counter() - began
    report.add(f"pomscale: first batch at {start:,} of {count:,}", seconds=ours)
    stream = iter(webdataset.WebDataset(_shards(dataset), shardshuffle=False))
    skipped, began = 0, time.perf_counter()
    while skipped < start and time.perf_counter() - began < 4 * seconds:
        next(stream)
        skipped += 1
    rate = skipped / (time.perf_counter() - began)
    report.add(f"webdataset: skipping {skipped:,}, the rest at that speed", seconds=start / rate, samples_per_s=rate)
    report.compare("seconds to resume", ours, 1.0, at_least=False)


def _memory(report: BenchReport, datasets: dict[int, Path]) -> None:
    """Measure the memory of processes that read 200 batches of sets that differ only in their length."""
    peaks = {}
    for count, dataset in datasets.items():
        peaks[count] = peak_private_mib(_READ, str(dataset))
        report.add(f"a loader process on {count:,} samples", peak_private_mib=peaks[count])
    few, many = min(peaks), max(peaks)
    growth = (peaks[many] - peaks[few]) * 2**20 / (many - few)
    report.add("growth of a loader process with the dataset", bytes_per_sample=growth)
    report.compare(f"peak memory at {many:,} samples over {few:,}", peaks[many] / peaks[few], 1.1, at_least=False)


_READ = """
import itertools, sys
from pathlib import Path
from pomscale.benchmarks.loader import _open
with _open(Path(sys.argv[1]), 2) as loader:
    for _ in itertools.islice(loader, 200):
        pass
"""
