"""`pomscale bench codecs`: the throughput table of codecs, beside a bare loop of the same module.

Networks have the sizes of those that people use and random weights, on which neither speed nor memory depends, so
nothing is downloaded. Pictures and clips go from files on disk through `data encode`; the rival calls the module over
tensors in memory, before and after. Both must give the same latents first.
"""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.encode.encode import encode
from pomscale.base.errors import InputError, PomscaleError
from pomscale.benchmarks.memory import peak_allocated_bytes
from pomscale.benchmarks.report import BenchReport
from pomscale.codecs import Codec, build_codec
from pomscale.config.codecs import VaeCodecConfig
from pomscale.config.encode import EncodeRecipe
from pomscale.media.mp4 import open_mp4

_OVERHEAD_WANTED = 0.05
_EQUAL = 1e-3
"""Largest difference of latents, relative to the largest value; bfloat16 is compared with itself."""
_NUM_FILES = 16
_FPS = 16

_KL: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


@dataclass(frozen=True)
class Autoencoder:
    """An autoencoder of diffusers, as its constructor builds it with `arguments`.

    frames: 1 + k times this many frames come back; None = it takes pictures.
    """

    class_name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    frames: int | None = None


AUTOENCODERS: dict[str, Autoencoder] = {
    "sd": Autoencoder("AutoencoderKL", _KL | {"latent_channels": 4}),
    "flux.1": Autoencoder(
        "AutoencoderKL", _KL | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    ),
    "flux.2": Autoencoder("AutoencoderKLFlux2"),
    "qwen-image": Autoencoder("AutoencoderKLQwenImage"),
    "dc-ae": Autoencoder("AutoencoderDC"),
    "taesd": Autoencoder("AutoencoderTiny"),
    "rae": Autoencoder("AutoencoderRAE"),
    "cogvideox": Autoencoder("AutoencoderKLCogVideoX", frames=8),
    "wan-2.1": Autoencoder("AutoencoderKLWan", frames=4),
    "wan-2.2": Autoencoder(
        "AutoencoderKLWan",
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
        },
        frames=4,
    ),
    "hunyuan-video": Autoencoder("AutoencoderKLHunyuanVideo", frames=4),
    "hunyuan-video-1.5": Autoencoder("AutoencoderKLHunyuanVideo15", frames=4),
    "ltx-video": Autoencoder("AutoencoderKLLTXVideo", frames=8),
    "mochi": Autoencoder("AutoencoderKLMochi", frames=6),
}


@dataclass(frozen=True)
class CodecBench:
    """What is measured, for how long.

    Attributes:
        device: Device to compute on.
        picture: Side of pictures in pixels.
        clip: (frames, height, width) of clips; fewer frames where as many do not come back.
        batch: Pictures of an encoder call; clips go one by one.
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
    unknown = [name for name in names if name not in AUTOENCODERS]
    if unknown:
        raise InputError(f"bench codecs: {unknown[0]!r} is none of {', '.join(AUTOENCODERS)}")
    report = BenchReport("codecs")
    with tempfile.TemporaryDirectory(prefix="pomscale-bench-") as temporary:
        for name in names or AUTOENCODERS:
            _Measured(report, bench, name, AUTOENCODERS[name], Path(temporary)).run()
            gc.collect()
    return report


class _Measured:
    """One autoencoder, measured."""

    def __init__(
        self, report: BenchReport, bench: CodecBench, name: str, autoencoder: Autoencoder, folder: Path
    ) -> None:
        self._report, self._bench, self._name, self._frames = report, bench, name, autoencoder.frames
        self._folder = folder / name
        self._media = folder / ("pictures" if autoencoder.frames is None else "clips")
        self._module = _build(autoencoder)
        self._module.save_pretrained(self._folder / "vae")
        config = VaeCodecConfig(name="vae", path=str(self._folder / "vae"), precision=bench.precision)
        self._codec: Codec = build_codec(config).to(bench.device)
        self._module = self._codec.vae  # type: ignore[attr-defined]  # the rival is the very module, with its settings
        self._size = self._size_of_one()
        self._batch = bench.batch if autoencoder.frames is None else 1

    def run(self) -> None:
        pixels = torch.rand(self._batch, 3, *self._size, device=self._bench.device)
        self._check_equal(pixels)  # and warm up
        one = _seconds(lambda: self._bare(pixels), self._bench.device)
        num_batches = max(2, math.ceil(self._bench.seconds / one))
        num_samples = num_batches * self._batch
        before = self._rate_of_bare(pixels, num_batches)
        done, busy_share = self._encode(num_samples)
        after = self._rate_of_bare(pixels, num_batches)
        parameters = sum(parameter.numel() for parameter in self._module.parameters())
        # Last, since torch's profiler on a CPU slows down what it watches.
        peak = peak_allocated_bytes(lambda: self._bare(pixels), self._bench.device)
        bare = (before + after) / 2
        what = "pictures_per_s" if self._frames is None else "clips_per_s"
        self._report.add(
            f"{self._name}, {' x '.join(map(str, self._size))}, {self._bench.precision}",
            parameters_m=parameters / 1e6,
            **{what: done["items_per_s"], f"bare_{what}": [before, after]},
            encoder_busy=busy_share,
            bytes_per_sample=done["bytes_per_sample"],
            weights_mib=4 * parameters / 2**20,
            peak_mib_of_a_call=peak / 2**20,
        )
        overhead = bare / done["items_per_s"] - 1.0
        self._report.compare(f"{self._name}: overhead over the bare loop", overhead, _OVERHEAD_WANTED, at_least=False)

    def _size_of_one(self) -> tuple[int, ...]:
        if self._frames is None:
            size: tuple[int, ...] = (self._bench.picture, self._bench.picture)
        else:
            frames, height, width = self._bench.clip
            size = (1 + (frames - 1) // self._frames * self._frames, height, width)
        self._codec.latent_shape(*size)  # InputError where the sides do not fit
        return size

    def _bare(self, pixels: Tensor) -> Tensor:
        """Encode pixels in [0, 1] by the module alone -> its mean, or its latents."""
        pixels = pixels if self._name == "rae" else 2 * pixels - 1
        pixels = pixels[:, :, None] if self._name == "qwen-image" else pixels
        autocast = torch.autocast(pixels.device.type, torch.bfloat16, enabled=self._bench.precision == "bf16")
        with torch.no_grad(), autocast:
            encoded = self._module.encode(pixels, return_dict=False)[0]
        return encoded if isinstance(encoded, Tensor) else encoded.mean

    def _check_equal(self, pixels: Tensor) -> None:
        """Note a failure if the codec gives other latents than the module, in whatever order these are stored."""
        noise = torch.zeros(self._batch, *self._codec.latent_shape(*self._size)) if self._codec.needs_noise else None
        found, expected = self._codec.encode(pixels, noise), self._bare(pixels).float()
        found = found.chunk(2, dim=1)[0] if self._codec.stores_moments else found
        ours, theirs = (latents.flatten().sort().values for latents in (found, expected))
        if ours.shape != theirs.shape or not (ours - theirs).abs().max() <= _EQUAL * theirs.abs().max():
            self._report.failures.append(f"{self._name}: the codec and the module give other latents")

    def _rate_of_bare(self, pixels: Tensor, num_batches: int) -> float:
        def loop() -> None:
            for _ in range(num_batches):
                self._bare(pixels).cpu()

        return num_batches * self._batch / _seconds(loop, self._bench.device)

    def _encode(self, num_samples: int) -> tuple[dict[str, float], float]:
        """Run `data encode` over so many files."""
        write = _write_pictures if self._frames is None else _write_clips
        if not self._media.exists():
            write(self._media, self._bench.clip[0])
        table = self._folder / "items.jsonl"
        names = sorted(path.name for path in self._media.iterdir())
        rows = [json.dumps({"file": names[number % len(names)]}) + "\n" for number in range(num_samples)]
        table.write_text("".join(rows), encoding="utf-8")
        recipe = EncodeRecipe.model_validate(
            {
                "kind": "encode",
                "name": self._name.replace(".", "-"),
                "output": str(self._folder / "shards"),
                "source": {"kind": "table", "path": str(table), "root": str(self._media), "media": "{file}"},
                "codec": self._codec.config.model_dump(),
                "transform": {"size": self._size[0]}
                if self._frames is None
                else {"kind": "video", "fps": _FPS, "buckets": [self._size]},
                "batch": self._batch,
                "device": self._bench.device.type,
            }
        )
        done = encode(recipe, progress=False)
        (dataset,) = done.datasets
        if dataset.num_samples != num_samples:
            raise PomscaleError(f"the encode made {dataset.num_samples} of {num_samples} samples: no figure")
        figures = {"items_per_s": done.items_per_s, "bytes_per_sample": dataset.num_bytes / num_samples}
        return figures, done.busy_share


def _build(autoencoder: Autoencoder) -> Any:
    import diffusers  # noqa: PLC0415  optional, and seconds to import

    torch.manual_seed(0)
    return getattr(diffusers, autoencoder.class_name)(**autoencoder.arguments).eval().requires_grad_(False)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _write_pictures(folder: Path, _: int) -> None:
    """Write JPEGs of 500x375, ImageNet's usual size: smooth noise, which compresses as photographs do."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(_NUM_FILES):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)


def _write_clips(folder: Path, num_frames: int) -> None:
    """Write mp4 files of 640x400: smooth noise that moves."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(_NUM_FILES):
        coarse = Image.fromarray(rng.integers(0, 256, (25, 40, 3), dtype=np.uint8))
        still = np.asarray(coarse.resize((640, 400), Image.Resampling.BICUBIC))
        with open_mp4(folder / f"{number:06d}.mp4", _FPS) as stream:
            stream.write(np.stack([np.roll(still, 4 * frame, axis=1) for frame in range(num_frames)]))
