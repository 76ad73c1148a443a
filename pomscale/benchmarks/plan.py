"""`pomscale bench plan`: the memory that a plan predicts, beside that of real training steps.

On the CPU, storages are counted (`storage_tracker`), and torch's fake process group stands for the other ranks: each
collective returns at once, so one process has the memory of one rank of many. On a GPU, one rank is compared by the
allocator's peak. DeepSpeed has processes of its own, since it can be set up only once per process.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from pomscale.base.condition import Condition, Text
from pomscale.benchmarks.report import BenchReport
from pomscale.benchmarks.storage_tracker import step_peak_bytes
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.train import TrainRecipe
from pomscale.diffusion.alignment import AlignedNetwork, alignment_loss
from pomscale.diffusion.objectives import FlowMatching, Network, per_sample_loss
from pomscale.distributed.flat_shard import FlatShard
from pomscale.distributed.world import World, join_world
from pomscale.engine import Engine, build_engine
from pomscale.models import init_weights, make_model
from pomscale.plan.batch import batch_share, num_times
from pomscale.plan.memory import state_bytes, step_memory
from pomscale.plan.model_cost import TEXT_LENGTH
from pomscale.training.loss import LocalTokens

_MIB = 2**20
_MODES = ("none", "selective", "every-2", "full")
# The widths are those of the presets; depth, latents and batch let a step take seconds on two cores.
_SIZES: dict[str, dict[str, Any]] = {
    "S": {"size": "s-2", "depth": 4, "latent_shape": [4, 32, 32], "batch": 2},
    "B": {"size": "b-2", "depth": 4, "latent_shape": [4, 24, 24], "batch": 2},
    "L": {"size": "l-2", "depth": 3, "latent_shape": [4, 16, 16], "batch": 4},
}
_GPU_SIZES: dict[str, dict[str, Any]] = {
    "S/2": {"size": "s-2", "depth": 12, "latent_shape": [4, 32, 32], "batch": 64},
    "L/2": {"size": "l-2", "depth": 24, "latent_shape": [4, 32, 32], "batch": 32},
    "XL/2": {"size": "xl-2", "depth": 28, "latent_shape": [4, 32, 32], "batch": 32},
}
# Clips have 5 frame groups; the width of the text is scaled down with the trunk.
_VIDEO: dict[str, Any] = {"size": "s-2", "depth": 4, "latent_shape": [16, 10, 8, 12], "batch": 2}
_GPU_VIDEO: dict[str, Any] = {"size": "xl-2", "depth": 20, "latent_shape": [16, 20, 30, 48], "batch": 2}
_VIDEO_MODES: dict[str, dict[str, Any]] = {
    "no mask": {},
    "block-causal": {"model": {"temporal": "block_causal"}},
    "a t per frame group": {
        "model": {"temporal": "block_causal"},
        "diffusion": {"time": {"per_frame_group": True}},
    },
}
_LAYOUTS: dict[str, dict[str, Any]] = {
    "shards of 4, 2 micro-batches": {"fsdp2": {"shard_size": 4}, "training": {"micro_batch": 2}},
    "prefetch 2, kept gathered": {"fsdp2": {"reshard_after_forward": False, "prefetch": 2}},
    "bf16 moments, 3 averages": {"optimizer": {"moments": "bf16"}, "ema": {"halflives_samples": [100, 200, 300]}},
}
_NUM_RANKS = 8


def bench_plan() -> BenchReport:
    """Report a row per setting: measured and planned peak.

    The error is given for the whole and for what a step adds to the memory between steps.
    """
    report = BenchReport("plan")
    if torch.cuda.is_available():
        with join_world("cuda") as world:
            _compare_modes(report, _GPU_SIZES, world)
            _compare_video(report, _GPU_VIDEO, world)
    else:
        with pretended_world(_NUM_RANKS) as world:
            _compare_modes(report, _SIZES, world)
            _compare_video(report, _VIDEO, world)
            for layout, changes in _LAYOUTS.items():
                _compare(report, f"dipom-B, {layout}", make_recipe("dipom", _SIZES["B"], changes, world.size), world)
        with join_world("cpu") as world:
            _compare(report, "dipom-B, one rank", make_recipe("dipom", _SIZES["B"], {}, 1), world)
        for stage, offload in ((1, False), (1, True), (2, False), (3, False)):
            _compare_deepspeed(report, stage, offload)
    errors = [abs(row["error"]) for row in report.rows]
    report.compare("largest error of the planned peak", max(errors), 0.1, at_least=False)
    return report


def _compare_video(report: BenchReport, size: Mapping[str, Any], world: World) -> None:
    for mixer, (mode, changes), checkpointing in itertools.product(
        ("vdipom", "vdit"), _VIDEO_MODES.items(), ("none", "full")
    ):
        recipe = make_recipe(
            mixer, size, {**changes, "compute": {"activation_checkpointing": checkpointing}}, world.size
        )
        _compare(report, f"{mixer}, {mode}, bf16, {checkpointing}", recipe, world)


def _compare_modes(report: BenchReport, sizes: Mapping[str, Mapping[str, Any]], world: World) -> None:
    for size, mixer, precision, mode in itertools.product(sizes, ("dipom", "dit"), ("fp32", "bf16"), _MODES):
        changes = {"compute": {"precision": precision, "activation_checkpointing": mode}}
        recipe = make_recipe(mixer, sizes[size], changes, world.size)
        _compare(report, f"{mixer}-{size}, {precision}, {mode}", recipe, world)


def make_recipe(
    mixer: str, size: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]], num_ranks: int
) -> TrainRecipe:
    """Build the recipe of a setting.

    Args:
        mixer: dipom or dit, vdipom or vdit.
        size: as in _SIZES, with `batch` per rank.
        changes: section -> fields.
        num_ranks: number of ranks.
    """
    batch, is_video = size["batch"] * num_ranks, mixer.startswith("v")
    fields: dict[str, dict[str, Any]] = {
        "codec": {"name": "vae", "path": "none"},
        "data": {"path": "none"},
        "model": {
            "preset": f"{mixer}-{size['size']}",
            "depth": size["depth"],
            "latent_shape": size["latent_shape"],
            **({"text_dim": 4096} if is_video or size["size"].endswith("-text") else {"num_classes": 100}),
        },
        "training": {"total_samples": 1000 * batch, "global_batch": batch},
        "checkpoint": {"every_samples": 1000},
        "compute": {"device": "cuda" if torch.cuda.is_available() else "cpu"},  # it is measured there
    }
    for section, change in changes.items():
        fields[section] = {**fields.get(section, {}), **change}
    engine = "deepspeed" if "deepspeed" in changes else "fsdp2"
    return TrainRecipe.model_validate({"kind": "train", "name": "plan", "engine": engine, **fields})


@contextmanager
def pretended_world(num_ranks: int) -> Iterator[World]:
    """Open a world as rank 0 of `num_ranks`, on the CPU, without the other ranks; what they would send is not set."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield World(0, num_ranks, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def real_step(recipe: TrainRecipe, world: World) -> tuple[Engine, Callable[[], None]]:
    """Build the engine of a recipe, and a step of it on random data: all micro-batches, the optimizer, the averages."""
    with torch.device("meta"):
        model = make_model(recipe.model)
    engine = build_engine(recipe, model, lambda model, assign: init_weights(model, 0, assign), world)
    share = batch_share(recipe, world.size)
    weights = dict.fromkeys(recipe.ema.averages, 0.1)
    local = LocalTokens.of(recipe, world)

    def loss(network: nn.Module, _: None) -> Tensor:
        shape = (share.micro_batch, *recipe.model.latent_shape)
        x0, eps = torch.randn(shape, device=world.device), torch.randn(shape, device=world.device)
        times = num_times(recipe)
        t = torch.rand(share.micro_batch if times == 1 else (share.micro_batch, times), device=world.device)
        part = network if local is None else partial(network, split_tokens=local.split)
        if recipe.model.dropout is not None:
            part = partial(part, dropout_seeds=torch.arange(share.micro_batch, device=world.device))
        condition, conditioned = _conditioned(recipe.model, share.micro_batch, part, world.device)
        if recipe.model.alignment is not None:
            size = (share.micro_batch, recipe.model.num_tokens, recipe.model.alignment.dim)
            features = torch.randn(size, device=world.device, dtype=torch.float16)
            aligned = AlignedNetwork(conditioned, share.micro_batch)
            diffusion = per_sample_loss(FlowMatching(), aligned, x0, eps, t, condition).mean()
            return diffusion + 0.5 * alignment_loss(aligned.projected, features).mean()
        if local is None:
            return per_sample_loss(FlowMatching(), conditioned, x0, eps, t, condition).mean()
        return per_sample_loss(FlowMatching(), conditioned, x0, eps, t, condition, local.part).mean()

    def step() -> None:
        engine.forward_backward([None] * share.num_micro_batches, loss)
        engine.step(1e-4, weights)

    return engine, step


def measure(recipe: TrainRecipe, world: World) -> tuple[int, int]:
    """Return the bytes at the peak of a step of the real engine, and between steps; the second step is measured."""
    engine, step = real_step(recipe, world)
    step()
    held = [*engine.model.parameters(), *_tensors(engine.state_dict())]
    return step_peak_bytes(step, world.device, held), sum(engine.resident_bytes().values())


def _conditioned(
    model: ImageModelConfig | VideoModelConfig, batch: int, network: Callable[..., Tensor], device: torch.device
) -> tuple[Condition, Network]:
    """Return the condition of a batch, and the network, which for clips is given their first frame groups."""
    zeros = torch.zeros(batch, dtype=torch.int64, device=device)
    if model.text_dim is None:
        return zeros, network
    embeddings = torch.randn(batch, TEXT_LENGTH, model.text_dim, dtype=torch.float16, device=device)
    mask = torch.ones(batch, TEXT_LENGTH, dtype=torch.bool, device=device)
    network = partial(network, start=zeros) if isinstance(model, VideoModelConfig) else network
    return Text(embeddings, mask), network


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    else:
        yield state.values if isinstance(state, FlatShard) else state


def _compare(report: BenchReport, what: str, recipe: TrainRecipe, world: World) -> None:
    _add(report, what, recipe, world.size, *measure(recipe, world))


def _compare_deepspeed(report: BenchReport, stage: int, offload: bool) -> None:
    what = f"ZeRO-{stage}{', optimizer offloaded' if offload else ''}"
    if importlib.util.find_spec("deepspeed") is None:
        print(f"{what}: DeepSpeed is not installed, so this is not measured")
        return
    planned_for = deepspeed_recipe(stage, offload=offload)
    _add(report, f"dipom-B, {what}", planned_for, _NUM_RANKS, *measure_deepspeed(stage, offload=offload))


def measure_deepspeed(stage: int, size: str = "B", *, offload: bool = False) -> tuple[int, int]:
    """Call `measure` for `deepspeed_recipe` in a process of its own.

    The state that is offloaded is taken off: on the CPU it is counted, too.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ONE_STAGE, str(stage), size, str(int(offload)), str(_NUM_RANKS)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    in_host_memory = state_bytes(deepspeed_recipe(stage, size, offload=offload)) // _NUM_RANKS if offload else 0
    peak, resident = done.stdout.split()[-2:]
    return int(peak) - in_host_memory, int(resident) - in_host_memory


_ONE_STAGE = """
import sys
from pomscale.benchmarks.plan import deepspeed_recipe, measure, pretended_world
stage, size, offload, num_ranks = sys.argv[1:]
with pretended_world(int(num_ranks)) as world:
    print(*measure(deepspeed_recipe(int(stage), size, offload=offload == "1"), world))
"""


def deepspeed_recipe(stage: int, size: str = "B", *, offload: bool = False) -> TrainRecipe:
    """Build the recipe of a stage of ZeRO in bf16 at one of _SIZES, with the optimizer in host memory or not."""
    changes = {"deepspeed": {"zero_stage": stage, "offload_optimizer": offload}}
    return make_recipe("dipom", _SIZES[size], changes, _NUM_RANKS)


def _add(report: BenchReport, what: str, recipe: TrainRecipe, num_ranks: int, peak: int, resident: int) -> None:
    planned = step_memory(recipe, num_ranks)
    report.add(
        what,
        measured_mib=peak / _MIB,
        planned_mib=planned.peak / _MIB,
        error=planned.peak / peak - 1,
        error_of_the_step=(planned.peak - resident) / (peak - resident) - 1,
        moment=planned.moment,
    )
