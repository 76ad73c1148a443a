"""`pomscale bench video`: cost of clips, generated frame group by frame group and trained on, with PoM and attention.

Generation is measured in a process of its own for each mixer and length, which writes the groups to disk as they come.
On the CPU the networks are small ones; on a GPU they are the presets of `config.presets` at the sizes of the recipes.
No figure is given unless sequential generation equals the masked forward pass.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from pomscale.base.condition import Text
from pomscale.base.errors import PomscaleError
from pomscale.benchmarks.operators.timing import measured
from pomscale.benchmarks.report import BenchReport
from pomscale.benchmarks.storage_tracker import StorageTracker, step_peak_bytes
from pomscale.config.hardware import peak_flops
from pomscale.config.model import VideoModelConfig
from pomscale.config.train import TrainRecipe
from pomscale.diffusion.objectives import FlowMatching, per_sample_loss
from pomscale.diffusion.options import SamplingOptions
from pomscale.diffusion.sequential import SequentialSampler
from pomscale.distributed.activation_checkpointing import checkpoint_blocks
from pomscale.distributed.world import World, join_world, resolve_device
from pomscale.engine import build_engine
from pomscale.models import MixerState, VDiPoM, init_weights, make_model
from pomscale.models.video import VideoBlock
from pomscale.monitoring.report.plots import COLORS
from pomscale.ops.pom import BlockCausal, Mask, dense_mask
from pomscale.plan import training_flops

_MIB, _GIB = 2**20, 2**30
_WANTED_ERROR = 1e-5
_TEXT_LENGTH = 120
_NAMES = {"pom": "PoM", "attention": "attention"}


@dataclass(frozen=True)
class _Sizes:
    """Fields of VideoModelConfig for clips that are streamed, a step of 3,600 tokens, and the sweep over tokens.

    The sweep has `tokens_of_group` tokens in a frame group.
    """

    stream: Mapping[str, Any]
    step: Mapping[str, Any]
    sweep: Mapping[str, Any]
    tokens_of_group: int
    dtype: torch.dtype


_SMALL = {"text_dim": 64, "ffn_expansion": 4, "num_heads": 4}
_CPU = _Sizes(
    stream={**_SMALL, "latent_shape": (4, 2, 12, 16), "dim": 128, "depth": 4},
    step={**_SMALL, "latent_shape": (16, 20, 30, 48), "dim": 192, "depth": 2},
    sweep={**_SMALL, "latent_shape": (16, 2, 32, 32), "dim": 192, "depth": 2},
    tokens_of_group=256,
    dtype=torch.float32,
)
_XL = {"preset": "vdipom-xl-2", "text_dim": 4096}
_GPU = _Sizes(
    stream={"preset": "vdipom-s-2", "text_dim": 4096, "latent_shape": (16, 2, 30, 48)},
    step={**_XL, "latent_shape": (16, 20, 30, 48)},
    sweep={**_XL, "latent_shape": (16, 2, 32, 64)},
    tokens_of_group=512,
    dtype=torch.bfloat16,
)
_MOST_TOKENS = {"cpu": 16384, "cuda": 131072}


@dataclass
class Stream:
    """Seconds of each frame group of a clip, and the MiB that the process held at its end (GPU: at most)."""

    seconds: list[float]
    memory_mib: list[float]


def bench_video(*, num_groups: int, num_tokens: int | None, num_turns: int, plot: Path | None) -> BenchReport:
    """Measure generation, training and a sweep over tokens.

    Args:
        num_groups: frame groups of the longest clip; a tenth and a hundredth of it are generated too.
        num_tokens: most tokens of the sweep, which begins with 4 frame groups; None = 16384, on a GPU 131072.
        num_turns: turns of each training step.
        plot: PNG for the curves.

    Raises:
        PomscaleError: if sequential generation is not exact.
    """
    report = BenchReport("video")
    device = resolve_device("auto")
    sizes = _GPU if device.type == "cuda" else _CPU
    _check_exactness(report)
    streams = _streams(report, num_groups, device)
    _steps(report, sizes, device, num_turns)
    if device.type == "cuda":
        with join_world("cuda") as world:
            for mixer in _NAMES:
                _train(report, mixer, sizes.step, world)
    sweep = _sweep(report, sizes, device, num_tokens or _MOST_TOKENS[device.type])
    if plot is not None:
        _draw(streams, sweep).savefig(plot, dpi=120)
        print(f"wrote {plot}")
    return report


def make_network(
    mixer: str, fields: Mapping[str, Any], device: torch.device, dtype: torch.dtype, **more: Any
) -> VDiPoM:
    """Build a network with random weights everywhere; with initial ones it is the identity, which would hide errors."""
    config = VideoModelConfig.model_validate({"kind": "video", **fields, "mixer": mixer, **more})
    torch.manual_seed(0)
    with device:
        model = VDiPoM(config).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.02)
    return model


def _text(config: VideoModelConfig, batch: int, device: torch.device) -> Text:
    mask = torch.ones(batch, _TEXT_LENGTH, dtype=torch.bool, device=device)
    return Text(torch.randn(batch, _TEXT_LENGTH, config.text_dim, device=device), mask)


# --- correctness -----------------------------------------------------------------------------------------------------


def _check_exactness(report: BenchReport) -> None:
    """Compare frame groups one after another with all of them under the mask, in fp32, in both forms."""
    fields = {**_SMALL, "latent_shape": (4, 16, 12, 16), "dim": 128, "depth": 4, "temporal": "block_causal"}
    for mixer, name in _NAMES.items():
        model = make_network(mixer, fields, torch.device("cpu"), torch.float32).requires_grad_(False)
        clips, t, text = (
            torch.randn(2, *model.config.latent_shape),
            torch.rand(2),
            _text(model.config, 2, torch.device("cpu")),
        )
        groups = clips.split(model.config.patch_frames, dim=2)
        one_time: list[MixerState] | None = None
        clean: list[MixerState] | None = None
        whole = model(clips, t, text)
        errors = []
        for number, group in enumerate(groups):
            rows = slice(number * model.config.patch_frames, (number + 1) * model.config.patch_frames)
            prediction, one_time = model.step(group, t, text, one_time, number)
            errors.append(_error(prediction, whole[:, :, rows]))
            prediction, _ = model.step(group, t, text, clean, number)
            times = torch.cat([torch.zeros(2, number), t[:, None]], dim=1)
            errors.append(_error(prediction, model(clips[:, :, : rows.stop], times, text)[:, :, rows]))
            _, clean = model.step(group, torch.zeros(2), text, clean, number)
        report.add(f"sequential against the masked forward pass, {name}", error=max(errors))
        if max(errors) > _WANTED_ERROR:
            raise PomscaleError(f"{name}: sequential generation is off by {max(errors):.1e}: no figures")


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- generation ------------------------------------------------------------------------------------------------------


def _streams(report: BenchReport, num_groups: int, device: torch.device) -> dict[str, Stream]:
    """Measure generation. Returns mixer -> the stream of the longest clip."""
    lengths = sorted({max(1, num_groups // 100), max(1, num_groups // 10), num_groups})
    longest = {}
    for mixer, name in _NAMES.items():
        peaks: dict[int, dict[str, float]] = {}
        for length in lengths:
            stream = Stream(**_in_a_process("stream_clip", mixer, length))
            peaks[length] = {"peak_mib": max(stream.memory_mib)}
            if device.type == "cpu":
                peaks[length]["tensors_mib"] = _in_a_process("stream_peak_mib", mixer, length)
            part = max(1, length // 10)
            first_s, last_s = (statistics.median(s) for s in (stream.seconds[:part], stream.seconds[-part:]))
            what = f"{name}, {length} frame groups, to disk"
            report.add(what, **peaks[length], first_tenth_s=first_s, last_tenth_s=last_s)
        longest[mixer] = stream
        if mixer == "pom":
            for kind, peak in peaks[lengths[-1]].items():
                what = f"PoM, {kind} of {lengths[-1]} frame groups over {lengths[0]}"
                report.compare(what, peak / peaks[lengths[0]][kind], 1.02, at_least=False)
            report.compare("PoM, change of the time per frame group", abs(last_s / first_s - 1), 0.05, at_least=False)
    return longest


def stream_clip(mixer: str, num_groups: int) -> dict[str, list[float]]:
    """Generate a clip and return the fields of a Stream; with one t for all frames, each evaluation carries a state."""
    clips, _ = _new_clip(mixer)
    seconds, memory_mib = [], []
    with tempfile.TemporaryFile() as file:
        for _ in range(num_groups):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            start_s = time.perf_counter()
            file.write(clips.advance().cpu().numpy().tobytes())
            seconds.append(time.perf_counter() - start_s)
            memory_mib.append(_held_mib())
    return {"seconds": seconds, "memory_mib": memory_mib}


def stream_peak_mib(mixer: str, num_groups: int) -> float:
    """Return the peak of tensors that are alive at once, weights included, in MiB on the CPU."""
    clips, model = _new_clip(mixer)
    with tempfile.TemporaryFile() as file, StorageTracker(model.parameters()) as tracker:
        for _ in range(num_groups):
            file.write(clips.advance().numpy().tobytes())
    return tracker.peak / _MIB


def _new_clip(mixer: str) -> tuple[SequentialSampler[list[MixerState]], VDiPoM]:
    device = resolve_device("auto")
    sizes = _GPU if device.type == "cuda" else _CPU
    model = make_network(mixer, sizes.stream, device, sizes.dtype, temporal="block_causal").requires_grad_(False)
    channels, _, height, width = model.config.latent_shape
    text = _text(model.config, 1, device)
    group_shape = (channels, model.config.patch_frames, height, width)
    clips = SequentialSampler(
        FlowMatching(), model.step, group_shape, text, text, [0], SamplingOptions(num_steps=2), time_per_group=False
    )
    return clips, model


def _held_mib() -> float:
    """Return the memory held; on the CPU the private one, since the kernel can reclaim pages of mapped files."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / _MIB
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def _in_a_process(function: str, mixer: str, num_groups: int) -> Any:
    """Call a function of this module in a process of its own: memory left by another clip would count."""
    arguments = f"{mixer!r}, {num_groups}"
    code = f"import json; from pomscale.benchmarks.video import {function}; print(json.dumps({function}({arguments})))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- a training step of 3,600 tokens ---------------------------------------------------------------------------------


def _steps(report: BenchReport, sizes: _Sizes, device: torch.device, num_turns: int) -> None:
    """Measure forward and backward of one clip; the kinds take turns, so that all meet the same machine."""
    kinds: dict[str, VDiPoM] = {
        "PoM, no mask": make_network("pom", sizes.step, device, sizes.dtype),
        "PoM, block-causal": make_network("pom", sizes.step, device, sizes.dtype, temporal="block_causal"),
        "PoM, the same mask explicit": make_network("pom", sizes.step, device, sizes.dtype, temporal="block_causal"),
        "attention, no mask": make_network("attention", sizes.step, device, sizes.dtype),
        "attention, block-causal": make_network("attention", sizes.step, device, sizes.dtype, temporal="block_causal"),
    }
    config = kinds["PoM, block-causal"].config
    for block in kinds["PoM, the same mask explicit"].blocks():
        assert isinstance(block, VideoBlock)
        frame_length = config.num_tokens // config.num_groups
        block.register_module("mixer", _ExplicitMask(block.mixer, config.num_tokens, frame_length, device))
    clip, t, text = (
        torch.randn(1, *config.latent_shape, device=device),
        torch.rand(1, device=device),
        _text(config, 1, device),
    )
    with torch.no_grad():
        masked, explicit = (
            kinds[f"PoM, {kind}"](clip, t, text).float() for kind in ("block-causal", "the same mask explicit")
        )
    if _error(masked, explicit) > (_WANTED_ERROR if sizes.dtype == torch.float32 else 3e-2):
        raise PomscaleError(f"block-causal and its mask differ by {_error(masked, explicit):.1e}: no figures")

    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(num_turns + 1):
        for name, model in kinds.items():
            step = partial(_forward_backward, model, clip, t, text)
            step_s = measured(step, device).wall_s
            if turn:  # the first warms up
                seconds[name].append(step_s)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    base = medians["PoM, no mask"]
    for name, step_s in medians.items():
        report.add(f"step of {config.num_tokens} tokens, {name}", step_s=step_s, over_no_mask=step_s / base)
    report.compare(
        "PoM, block-causal step over one with no mask", medians["PoM, block-causal"] / base, 1.15, at_least=False
    )


class _ExplicitMask(nn.Module):
    """Block-causal mask as a tensor (b n n), as an operator without a form of its own would need it."""

    def __init__(self, mixer: nn.Module, num_tokens: int, frame_length: int, device: torch.device) -> None:
        super().__init__()
        self.mixer = mixer
        self.register_buffer(
            "mask", dense_mask(BlockCausal(frame_length), 1, num_tokens, num_tokens, device), persistent=False
        )

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        mixed: Tensor = self.mixer(x, mask=self.mask)
        return mixed


def _forward_backward(model: VDiPoM, clip: Tensor, t: Tensor, text: Text) -> None:
    model(clip, t, text).float().square().mean().backward()
    model.zero_grad(set_to_none=True)


# --- training as the engine does it ----------------------------------------------------------------------------------


def _train(
    report: BenchReport, mixer: str, fields: Mapping[str, Any], world: World, *, batch: int = 8, num_steps: int = 8
) -> None:
    """Measure whole steps with compiled blocks, AdamW and an average: block-causal in bf16, the blocks recomputed."""
    recipe = TrainRecipe.model_validate(
        {
            "kind": "train",
            "name": "bench",
            "codec": {"name": "vae", "path": "none"},
            "data": {"path": "none"},
            "model": {**fields, "mixer": mixer, "temporal": "block_causal", "kind": "video"},
            "training": {"total_samples": 1000 * batch, "global_batch": batch},
            "compute": {"precision": "bf16", "compile": True, "activation_checkpointing": "full"},
            "checkpoint": {"every_samples": 1000},
        }
    )
    assert isinstance(recipe.model, VideoModelConfig)
    config = recipe.model
    with torch.device("meta"):
        model = make_model(config)
    engine = build_engine(recipe, model, lambda model, assign: init_weights(model, 0, assign), world)
    x0, eps = torch.randn(2, batch, *config.latent_shape, device=world.device)
    t, text = torch.rand(batch, device=world.device), _text(config, batch, world.device)

    def step() -> None:
        engine.forward_backward(
            [None], lambda network, _: per_sample_loss(FlowMatching(), network, x0, eps, t, text).mean()
        )
        engine.step(1e-4, dict.fromkeys(recipe.ema.averages, 0.1))

    for _ in range(3):
        step()  # compiles and warms up
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step_s = statistics.median(measured(step, world.device).wall_s for _ in range(num_steps))
    figures: dict[str, Any] = {"batch": batch, "step_s": step_s, "samples_per_s": batch / step_s}
    if world.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(world.device), "bf16")
        flops = training_flops(config, text_length=_TEXT_LENGTH) * batch / step_s
        figures |= {
            "mfu": None if peak is None else flops / peak,
            "peak_gib": torch.cuda.max_memory_allocated() / _GIB,
        }
    report.add(f"training, {_NAMES[mixer]}, {config.num_tokens} tokens", **figures)


# --- from few tokens to many -----------------------------------------------------------------------------------------


def _sweep(report: BenchReport, sizes: _Sizes, device: torch.device, most: int) -> dict[str, list[tuple[int, float]]]:
    """Return mixer -> (tokens, seconds) of forward and backward of one clip, unmasked, its blocks recomputed."""
    curves: dict[str, list[tuple[int, float]]] = {mixer: [] for mixer in _NAMES}
    models = {mixer: make_network(mixer, sizes.sweep, device, sizes.dtype) for mixer in _NAMES}
    for model in models.values():
        checkpoint_blocks(model.blocks(), "full")
    num_tokens = 4 * sizes.tokens_of_group
    while num_tokens <= most:
        step_s = {}
        for mixer, model in models.items():
            channels, frames, height, width = model.config.latent_shape
            clip = torch.randn(1, channels, frames * num_tokens // sizes.tokens_of_group, height, width, device=device)
            t, text = torch.rand(1, device=device), _text(model.config, 1, device)

            def step(model: VDiPoM = model, clip: Tensor = clip, t: Tensor = t, text: Text = text) -> None:
                _forward_backward(model, clip, t, text)

            peak = step_peak_bytes(step, device, model.parameters())
            step_s[mixer] = statistics.median(measured(step, device).wall_s for _ in range(3))
            curves[mixer].append((num_tokens, step_s[mixer]))
            report.add(f"{num_tokens} tokens, {_NAMES[mixer]}", step_s=step_s[mixer], peak_gib=peak / _GIB)
        report.add(f"{num_tokens} tokens, attention over PoM", time=step_s["attention"] / step_s["pom"])
        num_tokens *= 2
    return curves


# --- the picture -----------------------------------------------------------------------------------------------------


def _draw(streams: Mapping[str, Stream], sweep: Mapping[str, list[tuple[int, float]]]) -> Figure:
    figure = Figure(figsize=(13, 4), layout="constrained")
    times, memory, tokens = figure.subplots(1, 3)
    for (mixer, name), color in zip(_NAMES.items(), COLORS, strict=False):
        numbers = range(1, len(streams[mixer].seconds) + 1)
        times.plot(numbers, [1000 * s for s in streams[mixer].seconds], label=name, color=color, linewidth=1)
        memory.plot(numbers, streams[mixer].memory_mib, label=name, color=color)
        tokens.plot(*zip(*sweep[mixer], strict=True), label=name, color=color, marker="o")
    for axes in (times, memory):
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    tokens.set_xscale("log", base=2)
    tokens.set_yscale("log")
    _label(times, "generating a frame group", "frame group", "ms")
    _label(memory, "memory held", "frame group", "MiB")
    _label(tokens, "forward and backward of a clip", "tokens", "s")
    return figure


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend()
