"""`pomscale bench codecs`: the throughput table of codecs, beside a bare loop of the same module.

Networks have the sizes of those that people use and random weights, on which neither speed nor memory depends, so
nothing is downloaded. Pictures, clips and captions go from files on disk through `data encode`; the rival calls the
module over tensors in memory, before and after. Both must give the same values first.
"""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from data_pipelines.encode.encode import encode
from pomscale.base.errors import InputError, PomscaleError
from pomscale.benchmarks.codec_networks import (
    AUTOENCODERS,
    FPS,
    TEXT_TOWERS,
    Autoencoder,
    TextTower,
    build_autoencoder,
    build_text_tower,
    captions,
    save_tokenizer,
    write_clips,
    write_pictures,
)
from pomscale.benchmarks.memory import peak_allocated_bytes
from pomscale.benchmarks.report import BenchReport
from pomscale.codecs import build_codec, build_text_encoder
from pomscale.config.codecs import VaeCodecConfig
from pomscale.config.encode import EncodeRecipe
from pomscale.config.text import TextEncoderConfig

_OVERHEAD_WANTED = 0.05
_EQUAL = {"fp32": 1e-3, "bf16": 3e-2}
"""Largest difference of the values, relative to the largest one, by precision."""
_COPIES = 2.5
"""Room that a network needs in host memory, over its weights in fp32: built, saved and loaded again."""


@dataclass(frozen=True)
class CodecBench:
    """What is measured, for how long.

    Attributes:
        device: Device to compute on.
        picture: Side of pictures in pixels.
        clip: (frames, height, width) of clips; fewer frames where as many do not come back.
        batch: Pictures or captions of an encoder call; clips go one by one.
        seconds: Least seconds of a loop.
        precision: Arithmetic of the encoders.
    """

    device: torch.device
    picture: int
    clip: tuple[int, int, int]
    batch: int
    seconds: float
    precision: Literal["fp32", "bf16"]


def bench_codecs(names: Sequence[str], bench: CodecBench) -> BenchReport:
    """Measure the codecs `names`, all of them if there are none. Raises InputError for a name that is none."""
    known = {**AUTOENCODERS, **TEXT_TOWERS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"bench codecs: {unknown[0]!r} is none of {', '.join(known)}")
    report = BenchReport("codecs")
    with tempfile.TemporaryDirectory(prefix="pomscale-bench-") as temporary:
        for name in names or known:
            if _fits(report, name):
                kind = _Autoencoder if name in AUTOENCODERS else _TextEncoder
                kind(report, bench, name, Path(temporary)).run()
            gc.collect()
    return report


def _fits(report: BenchReport, name: str) -> bool:
    """Return whether there is room for a network; note it if not."""
    with torch.device("meta"):
        network = _build(name)
    needed = _COPIES * 4 * sum(parameter.numel() for parameter in network.parameters())
    free = psutil.virtual_memory().available
    if needed > free:
        report.note(f"{name}: left out, it needs {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free")
    return needed <= free


def _build(name: str) -> Any:
    return build_autoencoder(AUTOENCODERS[name]) if name in AUTOENCODERS else build_text_tower(TEXT_TOWERS[name])


class _Measured(ABC):
    """One codec, measured; a subclass for each kind."""

    items: str
    """What is encoded: pictures, clips or tokens."""
    batch: int
    module: torch.nn.Module

    def __init__(self, report: BenchReport, bench: CodecBench, name: str, folder: Path) -> None:
        self.report, self.bench, self.name, self.folder = report, bench, name, folder / name
        network = _build(name)
        network.save_pretrained(self.folder / "network")

    @abstractmethod
    def bare(self) -> Tensor:
        """Run the module alone over a batch that lies in memory."""

    @abstractmethod
    def largest_difference(self) -> float:
        """Return the largest difference of what codec and module give, relative to the largest value."""

    @abstractmethod
    def recipe(self, num_samples: int) -> dict[str, Any]:
        """Return source and codec of an encode of so many samples, after writing what it reads."""

    @abstractmethod
    def describe(self) -> str:
        """Return the size of a sample."""

    def run(self) -> None:
        difference = self.largest_difference()  # and warm up
        if not difference <= _EQUAL[self.bench.precision]:
            self.report.failures.append(f"{self.name}: codec and module differ by {difference:.2g}")
        num_batches = max(2, math.ceil(self.bench.seconds / _seconds(self.bare, self.bench.device)))
        num_samples, per_sample = num_batches * self.batch, self.items_per_sample()
        before = self._rate_of_bare(num_batches)
        ours, busy_share, num_bytes = self._encode(num_samples)
        after = self._rate_of_bare(num_batches)
        parameters = sum(parameter.numel() for parameter in self.module.parameters())
        # Last, since torch's profiler on a CPU slows down what it watches.
        peak = peak_allocated_bytes(self.bare, self.bench.device)
        self.report.add(
            f"{self.name}, {self.describe()}, {self.bench.precision}",
            parameters_m=parameters / 1e6,
            **{
                f"{self.items}_per_s": per_sample * ours,
                f"bare_{self.items}_per_s": [per_sample * before, per_sample * after],
            },
            encoder_busy=busy_share,
            bytes_per_sample=num_bytes / num_samples,
            weights_mib=sum(p.numel() * p.element_size() for p in self.module.parameters()) / 2**20,
            peak_mib_of_a_call=peak / 2**20,
        )
        overhead = (before + after) / 2 / ours - 1.0
        self.report.compare(f"{self.name}: overhead over the bare loop", overhead, _OVERHEAD_WANTED, at_least=False)

    def items_per_sample(self) -> int:
        return 1

    def _rate_of_bare(self, num_batches: int) -> float:
        """Return samples per second."""

        def loop() -> None:
            for _ in range(num_batches):
                self.bare().cpu()

        return num_batches * self.batch / _seconds(loop, self.bench.device)

    def _encode(self, num_samples: int) -> tuple[float, float, int]:
        """Run `data encode` -> samples per second, share of the time that the encoder was busy, bytes of the shards."""
        values = {
            "kind": "encode",
            "name": self.name.replace(".", "-"),
            "output": str(self.folder / "shards"),
            "batch": self.batch,
            "device": self.bench.device.type,
            **self.recipe(num_samples),
        }
        done = encode(EncodeRecipe.model_validate(values), progress=False)
        (dataset,) = done.datasets
        if dataset.num_samples != num_samples:
            raise PomscaleError(f"the encode made {dataset.num_samples} of {num_samples} samples: no figure")
        return done.items_per_s, done.busy_share, dataset.num_bytes

    def table(self, rows: Iterator[dict[str, str]]) -> str:
        """Write a table of the source, and return its path."""
        path = self.folder / "items.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)


class _Autoencoder(_Measured):
    def __init__(self, report: BenchReport, bench: CodecBench, name: str, folder: Path) -> None:
        super().__init__(report, bench, name, folder)
        self._kind: Autoencoder = AUTOENCODERS[name]
        self.items = "pictures" if self._kind.frames is None else "clips"
        self.batch = bench.batch if self._kind.frames is None else 1
        self._media = folder / self.items
        config = VaeCodecConfig(name="vae", path=str(self.folder / "network"), precision=bench.precision)
        self._codec = build_codec(config).to(bench.device)
        self.module = self._codec.vae  # type: ignore[attr-defined]  # the very module, with the codec's settings
        self._size: tuple[int, ...] = (self._kind.side or bench.picture,) * 2
        if self._kind.frames is not None:
            frames, height, width = bench.clip
            self._size = (1 + (frames - 1) // self._kind.frames * self._kind.frames, height, width)
        self._codec.latent_shape(*self._size)  # InputError where the sides do not fit
        self._pixels = torch.rand(self.batch, 3, *self._size, device=bench.device)

    def bare(self) -> Tensor:
        pixels = self._pixels if self._kind.unit_pixels else 2 * self._pixels - 1
        pixels = pixels[:, :, None] if self._kind.is_of_frames else pixels
        with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16, self.bench.precision == "bf16"):
            encoded = self.module.encode(pixels, return_dict=False)[0]  # type: ignore[operator]
        return encoded if isinstance(encoded, Tensor) else encoded.mean

    def largest_difference(self) -> float:
        noise = torch.zeros(self.batch, *self._codec.latent_shape(*self._size)) if self._codec.needs_noise else None
        found, expected = self._codec.encode(self._pixels, noise), self.bare().float()
        found = found.chunk(2, dim=1)[0] if self._codec.stores_moments else found
        # Sorted, since some are stored in another order.
        return _difference(*(latents.flatten().sort().values for latents in (found, expected)))

    def recipe(self, num_samples: int) -> dict[str, Any]:
        if not self._media.exists():
            if self._kind.frames is None:
                write_pictures(self._media)
            else:
                write_clips(self._media, self.bench.clip[0])
        names = sorted(path.name for path in self._media.iterdir())
        table = self.table({"file": names[number % len(names)]} for number in range(num_samples))
        sides: dict[str, Any] = {"size": self._size[0]}
        if self._kind.frames is not None:
            sides = {"kind": "video", "fps": FPS, "buckets": [self._size]}
        return {
            "source": {"kind": "table", "path": table, "root": str(self._media), "media": "{file}"},
            "codec": self._codec.config.model_dump(),
            "transform": sides,
        }

    def describe(self) -> str:
        return " x ".join(map(str, self._size))


class _TextEncoder(_Measured):
    items = "tokens"

    def __init__(self, report: BenchReport, bench: CodecBench, name: str, folder: Path) -> None:
        super().__init__(report, bench, name, folder)
        self._kind: TextTower = TEXT_TOWERS[name]
        self.batch = bench.batch
        tokenizer = save_tokenizer(self.folder / "network")
        self._config = TextEncoderConfig.model_validate(
            {
                "name": "text",
                "path": str(self.folder / "network"),
                "precision": bench.precision,
                "max_length": self._kind.max_length,
                **{"layers": [-1], "template": "", "drop_tokens": 0, "padding": "none", "clean": "none"},
            }
        )
        self._encoder = build_text_encoder(self._config).to(bench.device)
        self.module = self._encoder.parts[0].module  # type: ignore[attr-defined]
        self._captions = captions(self._kind.max_length)
        self._ids = torch.tensor(tokenizer(self._captions[: self.batch]).input_ids, device=bench.device)

    def bare(self) -> Tensor:
        with torch.no_grad():
            output = self.module(input_ids=self._ids, attention_mask=torch.ones_like(self._ids))
        values: Tensor = output.last_hidden_state
        return values

    def largest_difference(self) -> float:
        found = self._encoder.encode(self._captions[: self.batch])
        return _difference(torch.tensor(np.stack(found)), self.bare().float())

    def recipe(self, num_samples: int) -> dict[str, Any]:
        texts = (self._captions[number % len(self._captions)] for number in range(num_samples))
        table = self.table({"text": text} for text in texts)
        return {"source": {"kind": "table", "path": table, "caption": "text"}, "text": self._config.model_dump()}

    def items_per_sample(self) -> int:
        return self._kind.max_length

    def describe(self) -> str:
        return f"{self._kind.max_length} tokens"


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    return ((found.cpu() - expected.cpu()).abs().max() / expected.abs().max().cpu()).item()


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
