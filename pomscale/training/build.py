"""Building of a Trainer: a recipe and its data -> the parts that train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pomscale.base.clock import Clock
from pomscale.base.errors import InputError
from pomscale.checkpoint.store import CheckpointStore
from pomscale.config.engine import CheckpointConfig
from pomscale.config.hardware import peak_flops
from pomscale.config.model import VideoModelConfig, of_shape
from pomscale.config.train import TrainRecipe
from pomscale.data.bad_samples import BadSampleList
from pomscale.data.dataset import LatentDataset
from pomscale.data.loader import Loader, ReadAhead
from pomscale.data.mixture import Mixture
from pomscale.data.packed_loader import PackedLoader
from pomscale.data.packed_order import PackedOrder
from pomscale.diffusion.objectives import Objective, build_objective
from pomscale.distributed.stragglers import Stragglers
from pomscale.distributed.world import World
from pomscale.engine import build_engine
from pomscale.engine.divergence import Divergence
from pomscale.engine.out_of_memory import explained_out_of_memory
from pomscale.engine.protocol import Engine, InitWeights
from pomscale.evaluation.heldout import shape_sizes
from pomscale.models import make_model
from pomscale.monitoring.profiler import ProfileWindow
from pomscale.monitoring.throughput import mfu
from pomscale.plan.model_cost import training_flops
from pomscale.pretrained.card import ModelCard
from pomscale.runs.checkpoint_folder import final_folder, is_complete
from pomscale.runs.code_state import versions
from pomscale.runs.layout import BAD_SAMPLES_FILE, EMA_FOLDER
from pomscale.runs.wandb_id import read_wandb_id
from pomscale.shards.alignment import check_aligned
from pomscale.shards.schema import check_compatible, check_text
from pomscale.training.loss import (
    LocalTokens,
    TrainBatch,
    draw_batch,
    share_of_loss,
    spoil_gradient_if_not_finite,
)
from pomscale.training.packed import PackedBatch, draw_packed, share_of_packed_loss
from pomscale.training.periodic import PeriodicWork, open_events
from pomscale.training.process import Process
from pomscale.training.recovery import Recovery
from pomscale.training.resume import CHECKPOINT_FORMAT, Resumed, identity, restore
from pomscale.training.saving import Saver, Series
from pomscale.training.schedule import Schedule
from pomscale.training.step import packed_steps, steps
from pomscale.training.telemetry import Records, Row, Telemetry
from pomscale.training.trainer import Trainer

TrainLoader: TypeAlias = Loader[TrainBatch] | PackedLoader[PackedBatch]
"""Loader of a run's micro-batches."""


@dataclass(frozen=True)
class Inputs:
    """Everything that all starts of a run have in common.

    identity: see resume.identity. packed_order: steps of a packed run; None = of a global batch.
    """

    recipe: TrainRecipe
    folder: Path
    mixture: Mixture
    card: ModelCard
    identity: dict[str, Any]
    packed_order: PackedOrder | None = None


def open_inputs(recipe: TrainRecipe, folder: Path, *, pin_memory: bool = False) -> Inputs:
    """Open the datasets of a recipe, to be read for a GPU with `pin_memory`.

    Raises InputError if they do not fit its codec and model.
    """
    model = recipe.model
    alignment = recipe.diffusion.alignment
    mixture = Mixture.open(
        recipe.data,
        seed=recipe.seed,
        global_batch=recipe.training.order_batch,
        read_text=model.text_dim is not None,
        pin_memory=pin_memory,
        features_until=None if alignment is None else alignment.until_samples,
    )
    for dataset in mixture.datasets:
        check_compatible(dataset.location, dataset.manifest, recipe.codec, model)
        if dataset.text is not None:
            check_text(dataset.text.source.location, dataset.text.source.manifest, model)
        if dataset.features is not None:
            check_aligned(dataset.features.source.location, dataset.features.info, dataset.manifest, model)
        _check_tokens(recipe, dataset)
    card, packed = ModelCard.of(recipe, mixture), _packed_order(recipe, mixture)
    return Inputs(recipe, folder, mixture, card, identity(recipe, mixture), packed)


def _packed_order(recipe: TrainRecipe, mixture: Mixture) -> PackedOrder | None:
    """Return the steps of a packed run."""
    training = recipe.training
    if training.global_tokens is None:
        return None

    def num_tokens(shape: tuple[int, ...]) -> int:
        return of_shape(recipe.model, shape).num_tokens

    return PackedOrder(mixture.order, num_tokens, training.global_tokens, training.micro_tokens)


def _check_tokens(recipe: TrainRecipe, dataset: LatentDataset) -> None:
    """Raise InputError for samples with fewer tokens than ranks that are to share them."""
    for group in dataset.manifest.groups:
        num_tokens = of_shape(recipe.model, group.shape).num_tokens
        if num_tokens < recipe.mesh.sp:
            raise InputError(
                f"mesh.sp: {recipe.mesh.sp} ranks cannot share the {num_tokens} tokens of samples of shape "
                f"{'x'.join(map(str, group.shape))} in {dataset.location}; use at most {num_tokens}"
            )


def make_engine(recipe: TrainRecipe, initial: InitWeights, world: World) -> Engine:
    """Engine of the recipe with its model, initial weights and optimiser. A collective."""
    with explained_out_of_memory(recipe, world.device, dict):
        with torch.device("meta"):
            model = make_model(recipe.model)
        return build_engine(recipe, model, initial, world)


def open_loader(inputs: Inputs, world: World, position: int) -> TrainLoader:
    """Loader of this rank's micro-batches from the global position `position` on, with everything random drawn.

    Ranks that share the tokens of their samples read the same ones.
    """
    recipe, mixture, sp = inputs.recipe, inputs.mixture, inputs.recipe.mesh.sp
    ahead = ReadAhead(recipe.data.num_threads, recipe.data.prefetch, pin_memory=world.device.type == "cuda")
    texts = None if mixture.text is None else mixture.text.info
    if inputs.packed_order is not None:
        return PackedLoader(
            mixture,
            inputs.packed_order,
            rank=world.rank,
            world_size=world.size,
            start_position=position,
            ahead=ahead,
            finish=partial(draw_packed, recipe, texts=texts),
        )
    return Loader(
        mixture,
        micro_batch=recipe.training.micro_batch,
        rank=world.rank // sp,
        world_size=world.size // sp,
        start_position=position,
        ahead=ahead,
        finish=partial(draw_batch, recipe, texts=texts),
    )


def build_trainer(
    inputs: Inputs,
    resumed: Resumed,
    process: Process,
    records: Records,
    loader: TrainLoader,
) -> Trainer:
    """Build a Trainer that continues a run. A collective.

    Args:
        inputs: The recipe and its data.
        resumed: The state that the run continues from.
        process: This process.
        records: Where the trainer records what happens.
        loader: The micro-batches, opened at the position of `resumed.clock`.
    """
    recipe, meta = inputs.recipe, resumed.meta
    schedule = Schedule.of(recipe)
    objective = build_objective(recipe.diffusion)
    periodic = _periodic(inputs, resumed, objective, schedule, process, records)
    divergence = Divergence(recipe.faults, None if meta is None else meta["divergence"])
    bad_samples = BadSampleList(
        recipe.data.max_bad_samples,
        [] if meta is None else meta["bad_samples"],
        inputs.folder / BAD_SAMPLES_FILE if process.world.is_main else None,
    )
    saver = Saver(
        engine=resumed.engine,
        checkpoints=Series(resumed.checkpoints, recipe.checkpoint.every_samples),
        snapshots=_snapshots(inputs, process),
        meta=partial(_meta, _meta_of_start(inputs, process), bad_samples, divergence),
        schedule=schedule,
        process=process,
        records=records,
    )
    telemetry = Telemetry(
        process=process,
        records=records,
        profiler=ProfileWindow(recipe.profile, inputs.folder, process.world.rank, process.world.device),
        stragglers=Stragglers(process.world),
        every_samples=recipe.monitoring.every_samples,
        progress=partial(_progress, inputs.mixture, schedule, bad_samples, divergence),
        mfu=_mfu(recipe, inputs.mixture, process.world),
    )
    recovery = Recovery(
        divergence=divergence,
        bad_samples=bad_samples,
        restore=partial(restore, resumed.engine, resumed.checkpoints),
        saver=saver,
        telemetry=telemetry,
        process=process,
        records=records,
    )
    return Trainer(
        engine=resumed.engine,
        steps=packed_steps(loader) if isinstance(loader, PackedLoader) else steps(loader),
        loss=partial(spoil_gradient_if_not_finite, _share_of_loss(inputs, objective, process.world)),
        schedule=schedule,
        saver=saver,
        recovery=recovery,
        telemetry=telemetry,
        periodic=periodic,
        process=process,
    )


def _share_of_loss(inputs: Inputs, objective: Objective, world: World) -> Callable[[nn.Module, Any], Tensor]:
    """A micro-batch's share of the loss of its step. A collective."""
    recipe, normalization = inputs.recipe, inputs.card.normalization
    if recipe.training.global_batch is None:
        return partial(share_of_packed_loss, objective, normalization, world.device)
    local = LocalTokens.of(recipe, world)
    share = partial(share_of_loss, objective, normalization, recipe.training.global_batch, world.device, local)
    if recipe.diffusion.alignment is not None:
        share = partial(share, alignment_weight=recipe.diffusion.alignment.weight)
    return share


def _periodic(
    inputs: Inputs, resumed: Resumed, objective: Objective, schedule: Schedule, process: Process, records: Records
) -> PeriodicWork:
    recipe, engine = inputs.recipe, resumed.engine
    return PeriodicWork(
        events=open_events(recipe, inputs.folder, inputs.card, objective, engine.model, records.monitor, process.world),
        record_metrics=resumed.checkpoints.record_metrics,
        consistency_every_samples=recipe.faults.consistency_every_samples,
        engine=engine,
        average=recipe.ema.main,
        schedule=schedule,
        process=process,
        records=records,
    )


def _snapshots(inputs: Inputs, process: Process) -> Series | None:
    """Snapshots of the averages for `pomscale ema`, where the recipe asks for them. A collective."""
    ema = inputs.recipe.ema
    if ema.post_hoc is None:
        return None
    powers = ema.averages[-len(ema.post_hoc.widths) :]
    keep_all = CheckpointConfig(
        every_samples=ema.post_hoc.every_samples,
        keep_every_samples=1,
        asynchronous=inputs.recipe.checkpoint.asynchronous,
    )
    store = CheckpointStore(inputs.folder / EMA_FOLDER, keep_all, process.start)
    return Series(
        store,
        ema.post_hoc.every_samples,
        part=lambda state: {"ema": {name: state["ema"][name] for name in powers}},
        holds=lambda samples: process.world.on_main(lambda: is_complete(final_folder(store.root, samples))),
    )


def _meta_of_start(inputs: Inputs, process: Process) -> dict[str, Any]:
    """The part of every checkpoint's meta that is the same during a start of the run."""
    return {
        "format": CHECKPOINT_FORMAT,
        "card": inputs.card.model_dump(mode="json"),
        **inputs.identity,
        "incarnation": process.start.number,
        "wandb_id": read_wandb_id(inputs.folder),
        "versions": versions(),
    }


def _meta(of_start: dict[str, Any], bad_samples: BadSampleList, divergence: Divergence) -> dict[str, Any]:
    return {"bad_samples": bad_samples.known, "divergence": divergence.dump(), **of_start}


def _progress(
    mixture: Mixture, schedule: Schedule, bad_samples: BadSampleList, divergence: Divergence, clock: Clock
) -> Row:
    """Figures of a row of metrics that tell how far the run is at `clock`; see Telemetry.progress."""
    return {
        "train/learning_rate": schedule.learning_rate_to(clock),
        **dict(_epochs(mixture, clock.position)),
        "data/bad_samples": len(bad_samples),
        "faults/skipped_steps": divergence.num_skipped,
    }


def _epochs(mixture: Mixture, position: int) -> Iterator[tuple[str, float]]:
    """Metrics of how often each dataset was read, and, where it has several buckets, the least and the most read."""
    for name, epochs in mixture.epochs(position).items():
        of_dataset = f"/{name}" if len(mixture.names) > 1 else ""
        yield f"data/epoch{of_dataset}", epochs.mean
        if epochs.num_buckets > 1:
            yield f"data/epoch_min{of_dataset}", epochs.lowest
            yield f"data/epoch_max{of_dataset}", epochs.highest


def mean_flops(recipe: TrainRecipe, mixture: Mixture) -> float:
    """FLOPs of training on one sample: the mean over the mixture, whose samples may be smaller than the largest."""
    model = recipe.model
    if mixture.text is None:
        return training_flops(model)
    total = 0.0
    for dataset, share in zip(mixture.datasets, mixture.shares, strict=True):
        for group, size in shape_sizes(dataset).items():
            sized = of_shape(model, dataset.manifest.groups[group].shape)
            per_group = isinstance(sized, VideoModelConfig) and recipe.diffusion.time.per_frame_group
            flops = training_flops(
                sized,
                text_length=mixture.text.info.max_length,
                num_times=sized.token_grid[0] if per_group else 1,
            )
            total += share * size / len(dataset) * flops
    return total


def _mfu(recipe: TrainRecipe, mixture: Mixture, world: World) -> Callable[[float], float] | None:
    """Samples per second -> model FLOPs utilisation; None where the device's peak is not known."""
    if world.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(), recipe.compute.precision)
    flops = mean_flops(recipe, mixture)
    return None if peak is None else lambda samples_per_s: mfu(samples_per_s, flops, world.size, peak)
