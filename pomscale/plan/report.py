"""`pomscale plan`: memory, traffic, time and storage of a run before it starts, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from pomscale.base.errors import InputError
from pomscale.config.hardware import GPUS, Gpu
from pomscale.config.model import VideoModelConfig
from pomscale.config.train import TrainRecipe
from pomscale.plan.advice import Advice, cheapest_fit, room_for_more
from pomscale.plan.batch import BatchShare, batch_share, num_times
from pomscale.plan.checks import check_gpu, check_layout, notes
from pomscale.plan.memory import StepMemory, host_bytes, step_memory
from pomscale.plan.model_cost import TEXT_LENGTH, forward_flops, num_parameters, projection_flops
from pomscale.plan.optimizer import step_flops
from pomscale.plan.shadow.ledger import Part
from pomscale.plan.shadow.network import build_network
from pomscale.plan.speed import Speed, speed
from pomscale.plan.storage import Storage, storage
from pomscale.plan.traffic import traffic

USABLE_SHARE = 0.9
"""Share of a GPU's memory that counts as usable; the rest is for the CUDA context, NCCL, cuBLAS and fragments."""

DEFAULT_UTILIZATION = 0.4

_GIB = 2**30
_PARTS: dict[Part, str] = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "ema": "averages (EMA)",
    "gathered": "gathered weights",
    "reduction": "reduction buffers",
    "activations": "activations",
}


@dataclass(frozen=True)
class DatasetSize:
    """Samples and bytes of all training data, as the manifests say."""

    num_samples: int
    num_bytes: int


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run, made by `plan`.

    Memory and traffic are in bytes per GPU; `advice` is None if nothing better is known.
    """

    recipe: TrainRecipe
    num_nodes: int
    gpus_per_node: int
    gpu: Gpu
    utilization: float
    share: BatchShare
    memory: StepMemory
    host_bytes: int
    speed: Speed
    traffic: dict[str, int]
    storage: Storage
    dataset: DatasetSize | None
    advice: Advice | None
    notes: list[str]

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        return USABLE_SHARE * self.gpu.memory_gib * _GIB

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.usable_bytes


def plan(
    recipe: TrainRecipe,
    *,
    num_nodes: int,
    gpus_per_node: int,
    gpu: str,
    utilization: float = DEFAULT_UTILIZATION,
    dataset: DatasetSize | None = None,
) -> RunPlan:
    """Plan a run: its memory, speed, traffic and storage on num_nodes x gpus_per_node GPUs.

    Args:
        recipe: training recipe.
        num_nodes: number of nodes.
        gpus_per_node: GPUs of each node.
        gpu: kind of GPU, a key of GPUS.
        utilization: share of the data sheet's peak that the GPUs reach, 0 to 1, recomputation included; the run's MFU
            counts none and is lower.
        dataset: size of the training data; None if there is none yet.

    Raises:
        InputError: for an unknown kind of GPU, or a machine that the recipe does not fit for reasons other than memory.
    """
    if gpu not in GPUS:
        raise InputError(f"--gpu {gpu!r}: is none of {', '.join(GPUS)}")
    if not 0.0 < utilization <= 1.0:
        raise InputError(f"--mfu: a share of the peak between 0 and 1 is meant, got {utilization:g}")
    kind, num_gpus = GPUS[gpu], num_nodes * gpus_per_node
    check_layout(recipe, num_gpus)
    check_gpu(recipe, kind)
    memory, usable = step_memory(recipe, num_gpus), USABLE_SHARE * kind.memory_gib * _GIB
    better = room_for_more if memory.peak <= usable else cheapest_fit
    return RunPlan(
        recipe=recipe,
        num_nodes=num_nodes,
        gpus_per_node=gpus_per_node,
        gpu=kind,
        utilization=utilization,
        share=batch_share(recipe, num_gpus),
        memory=memory,
        host_bytes=host_bytes(recipe, num_gpus),
        speed=speed(recipe, num_gpus, kind, utilization),
        traffic=traffic(recipe, num_gpus),
        storage=storage(recipe),
        dataset=dataset,
        advice=better(recipe, num_gpus, usable),
        notes=notes(recipe, num_nodes, gpus_per_node),
    )


def render(plan: RunPlan) -> str:
    """Write the plan as text, one line per figure, ending in a newline."""
    lines = [_heading(plan), "", *_model(plan), *_memory(plan), *_speed(plan), *_traffic(plan), *_storage(plan)]
    lines += [f"{'note':<10}{note}" for note in plan.notes]
    return "\n".join([*lines, *_verdict(plan)]) + "\n"


def summary(plan: RunPlan) -> list[str]:
    """Write the plan in a few lines: speed, and whether it fits."""
    return [
        f"{'plan':<10}{_heading(plan)}",
        *_speed(plan),
        *(f"{'note':<10}{note}" for note in plan.notes),
        *_verdict(plan),
    ]


def misfit(plan: RunPlan) -> str:
    """Say why a plan that does not fit will fail, and the remedy."""
    needed, usable = (num_bytes / _GIB for num_bytes in (plan.memory.peak, plan.usable_bytes))
    return (
        f"{plan.recipe.name}: needs {needed:.1f} GiB per GPU, and {usable:.1f} GiB of an {plan.gpu.name} are usable; "
        f"{_verdict(plan)[0][10:]}"
    )


def _heading(plan: RunPlan) -> str:
    recipe, compute = plan.recipe, plan.recipe.compute
    sharding = f"ZeRO-{recipe.deepspeed.zero_stage}" if recipe.engine == "deepspeed" else recipe.engine
    if recipe.engine == "fsdp2" and recipe.fsdp2.shard_size not in (None, plan.num_gpus):
        sharding += f", shards of {recipe.fsdp2.shard_size}"
    if recipe.mesh.sp > 1:
        sharding += f", tokens over {recipe.mesh.sp}"
    return (
        f"{recipe.name} on {plan.num_nodes} x {plan.gpus_per_node} {plan.gpu.name}: {sharding}, {compute.precision}, "
        f"activation checkpointing {compute.activation_checkpointing}"
    )


def _model(plan: RunPlan) -> list[str]:
    model, training, share = plan.recipe.model, plan.recipe.training, plan.share
    times = num_times(plan.recipe)
    flops, nominal = (forward_flops(model, num_times=times, nominal=nominal) for nominal in (False, True))
    tokens = f"{model.num_tokens} tokens"
    if isinstance(model, VideoModelConfig):
        tokens += f" in {model.num_groups} frame groups"
    if model.text_dim is not None:
        tokens += f" with {TEXT_LENGTH} of text"
    each = "GPU" if plan.recipe.mesh.sp == 1 else f"{plan.recipe.mesh.sp} GPUs"
    # The nominal figure is for comparisons with other code; the plan's speed and MFU count what is executed.
    cost = f"{_count(flops)}FLOP per sample and forward pass"
    if nominal != flops:
        cost += f"; {_count(nominal)}FLOP nominal, with the output maps applied to every token"
    if model.alignment is not None:
        cost += f"; {_count(projection_flops(model))}FLOP more in training, of the projection for alignment"
    step = f"{training.global_batch} samples"
    if training.global_tokens is not None:
        step = f"{training.global_tokens} tokens, of {plan.recipe.samples_per_step} such samples"
    return [
        f"{'model':<10}{_count(num_parameters(model))} parameters, {tokens}, {cost}",
        f"{'step':<10}{step}: up to {share.num_micro_batches} x {share.micro_batch} per "
        f"{each}, {plan.speed.step_time_s:.3g} s",
    ]


def _memory(plan: RunPlan) -> list[str]:
    held = plan.memory.by_part
    shown = [part for part in _PARTS if held.get(part, 0) > plan.memory.peak / 1000]
    rows = [f"{'':<10}{_PARTS[part]:<20}{held[part] / _GIB:8.2f} GiB" for part in shown]
    rows[0] = f"{'memory':<10}{rows[0][10:]}"
    total, usable = plan.memory.peak / _GIB, plan.usable_bytes / _GIB
    rows.append(
        f"{'':<10}{'peak per GPU':<20}{total:8.2f} GiB of {usable:.1f} usable ({USABLE_SHARE:.0%} of "
        f"{plan.gpu.memory_gib:g}), {plan.memory.moment}"
    )
    return [*rows, f"{'':<10}{'host, per GPU':<20}{plan.host_bytes / _GIB:8.2f} GiB"]


def _speed(plan: RunPlan) -> list[str]:
    at = plan.speed
    line = f"{'speed':<10}{at.samples_per_s:,.0f} samples/s at {plan.utilization:.0%} of {_count(_peak(plan))}FLOP/s"
    if at.recomputed_share:
        line += f"; {at.recomputed_share:.0%} more arithmetic by recomputation, MFU {at.mfu:.1%}"
    lines = [line, *_muon(plan)]
    total = plan.recipe.training.total_samples
    return [
        *lines,
        f"{'':<10}{_time(at.days(total))} for {_count(total).strip()} samples, "
        f"{at.days(total) * plan.num_gpus * 24:,.0f} GPU-hours",
    ]


def _muon(plan: RunPlan) -> list[str]:
    optimizer, network = plan.recipe.optimizer, build_network(plan.recipe.model, num_times(plan.recipe))
    if optimizer.name != "muon":
        return []
    whole, of_gpu = (step_flops(optimizer, network, num_gpus) for num_gpus in (1, plan.num_gpus))
    return [
        f"{'':<10}Muon {_count(whole)}FLOP per step, {_count(of_gpu)}FLOP on the GPU with most of them: "
        f"{plan.speed.optimizer_share:.1%} of a step"
    ]


def _traffic(plan: RunPlan) -> list[str]:
    if not plan.traffic:
        return []
    sent = sum(plan.traffic.values())
    lines = [f"{'':<10}{name:<28}{_size(num_bytes)}" for name, num_bytes in plan.traffic.items()]
    lines[0] = f"{'traffic':<10}{lines[0][10:]}"
    rate = sent / plan.speed.step_time_s / 1e9
    return [
        *lines,
        f"{'':<10}{'sent per GPU and step':<28}{sent / _GIB:8.2f} GiB; hidden by arithmetic at {rate:.1f} GB/s",
    ]


def _storage(plan: RunPlan) -> list[str]:
    disk = plan.storage
    line = f"{'storage':<10}{disk.num_checkpoints} checkpoints of {disk.checkpoint / _GIB:.1f} GiB"
    if disk.num_ema_snapshots:
        line += f", {disk.num_ema_snapshots} EMA snapshots of {disk.ema_snapshot / _GIB:.1f} GiB"
    lines = [f"{line}: {disk.total / _GIB:,.0f} GiB"]
    if plan.dataset is not None:
        epochs = plan.recipe.training.total_samples / plan.dataset.num_samples
        size = plan.dataset.num_bytes / _GIB
        samples = _count(plan.dataset.num_samples).strip()
        lines.append(f"{'dataset':<10}{samples} samples, {size:,.1f} GiB, seen {epochs:.1f} times")
    return lines


def _verdict(plan: RunPlan) -> list[str]:
    if plan.advice is not None:
        with_it = f"{plan.advice.memory.peak / _GIB:.1f} GiB"
    if plan.fits:
        better = "" if plan.advice is None else f"; there is room for {plan.advice} ({with_it})"
        return [f"{'FITS':<10}{plan.memory.peak / plan.usable_bytes:.0%} of the usable memory{better}"]
    if plan.advice is None:
        return [f"{'NO FIT':<10}whatever is changed; use more GPUs, larger ones, or a smaller model"]
    return [f"{'NO FIT':<10}cheapest change that fits: {plan.advice} ({with_it})"]


def _peak(plan: RunPlan) -> float:
    return plan.gpu.peak(plan.recipe.compute.precision) * plan.num_gpus


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:8.2f} GiB" if num_bytes >= _GIB / 100 else f"{num_bytes / 2**20:8.2f} MiB"


def _time(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else f"{24 * days:.1f} hours"


def _count(count: float) -> str:
    """Write a count with three significant digits: 833 M, 305 G, 2.5 P."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * factor:
            return f"{count / factor:.3g} {prefix}"
    return f"{count:.3g} "
