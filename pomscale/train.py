"""Recipe -> everything the training loop uses -> the loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pomscale import __version__
from pomscale.card import ModelCard
from pomscale.checkpoint.store import CheckpointStore, latest_checkpoint, read_meta
from pomscale.codecs.base import Codec
from pomscale.config.schema import CacheConfig, TrainRecipe, ValidationConfig
from pomscale.data.bad_samples import BadSample, BadSampleList
from pomscale.data.dataset import LatentDataset
from pomscale.data.loader import Loader, MicroBatch
from pomscale.data.mixture import Mixture
from pomscale.data.schema import NOT_OF_THE_LATENTS, check_compatible, read_manifest
from pomscale.diffusion.draws import draw
from pomscale.diffusion.loss import per_sample_loss
from pomscale.diffusion.objectives import Objective, build_objective
from pomscale.distributed.stop import StopRequest
from pomscale.distributed.world import World, join_world
from pomscale.engine.ema import ema_weight
from pomscale.engine.fsdp2 import Fsdp2Engine
from pomscale.engine.optim import learning_rate
from pomscale.errors import InputError, PomscaleError
from pomscale.evaluation.heldout import ReadRecords, heldout_loss
from pomscale.evaluation.sampling import generate_on_all_ranks, grid_classes
from pomscale.models import DiPoM, init_weights
from pomscale.monitoring.host import HostStats
from pomscale.monitoring.media import save_grid
from pomscale.monitoring.monitor import Monitor, open_monitor
from pomscale.monitoring.names import validation_bin
from pomscale.monitoring.profiler import ProfileWindow
from pomscale.monitoring.throughput import mfu, peak_flops
from pomscale.monitoring.wandb_sink import read_wandb_id
from pomscale.plan.model_cost import num_parameters, training_flops
from pomscale.run_folder import BAD_SAMPLES, is_finished, open_run_folder, versions, write_outcome
from pomscale.trainer import Event, Trainer

EXIT_STOPPED = 75
"""Stopped on request after saving: run the same command again to go on."""

CHECKPOINT_FORMAT = 2

# What a run cannot change on its way: the samples, the noise or the network would no longer be those it began with.
_FIXED_FOR_A_RUN = (
    ("seed",),
    ("codec",),
    ("model",),
    ("diffusion",),
    ("data", "normalization"),
    ("data", "flip_probability"),
    ("data", "shuffle_window"),
    ("training", "global_batch"),
)

# What the card says of the space that the network has learned, and what to call it.
_LATENT_SPACE = {
    "codec_identity": "the weights of the codec that encoded the dataset",
    "latent_mean": "the mean that normalises latents",
    "latent_std": "the standard deviation that normalises latents",
}


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """A micro-batch with everything random drawn. Shapes: x0, eps (b, c, h, w); t, condition, weights (b,).

    `bad`: the samples that could not be read; their weight is 0.
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    condition: Tensor
    weights: Tensor
    bad: tuple[BadSample, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> TrainBatch:
        return TrainBatch(
            function(self.x0),
            function(self.eps),
            function(self.t),
            function(self.condition),
            function(self.weights),
            self.bad,
        )

    def pin_memory(self) -> TrainBatch:
        """Called by the loader's pinning thread."""
        return self.map(Tensor.pin_memory)

    def to(self, device: torch.device) -> TrainBatch:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def train(recipe: TrainRecipe) -> int:
    """Train until the recipe's samples are seen, or until asked to stop. Returns the exit code (0, or 75 if stopped).

    Call it in every process of the run, alone or under torchrun. Raises PomscaleError with a message for people. Once
    the run is accepted as this folder's, outcome.json says how this incarnation ended, in any case but a kill.
    """
    stop = StopRequest()  # before anything slow, so that a signal during the start-up is not lost
    try:
        with join_world(recipe.compute.device) as world:
            return _train_in(world, recipe, Path(recipe.output) / recipe.name, stop)
    finally:
        stop.restore()


def _train_in(world: World, recipe: TrainRecipe, folder: Path, stop: StopRequest) -> int:
    mixture = _open_mixture(recipe)
    _check_indexes(mixture, world)
    card = ModelCard.of(recipe, mixture.datasets[0].manifest, mixture.normalization)
    with torch.device("meta"):
        model = DiPoM(recipe.model)
    engine = Fsdp2Engine(
        model,
        lambda model, assign: init_weights(model, recipe.seed, assign),
        world,
        recipe.compute,
        recipe.optimizer,
    )
    checkpoints = CheckpointStore(
        folder / "checkpoints",
        keep_last=recipe.checkpoint.keep_last,
        asynchronous=recipe.checkpoint.asynchronous,
    )
    identity = _identity(recipe, mixture)
    start, known_bad = _resume(recipe, folder, identity, card, engine, checkpoints, world)
    if start >= recipe.training.total_samples and world.gather(is_finished(folder))[0]:
        if world.is_main:
            print(f"{folder}: finished already, {start:,} samples")
        return 0

    incarnation: Any = None
    if world.is_main:
        incarnation = open_run_folder(folder, recipe, start_samples=start, num_ranks=world.size)
    incarnation = world.gather(incarnation)[0]
    try:
        with ExitStack() as stack:
            monitor = stack.enter_context(_monitor(recipe, folder, incarnation, world))
            if world.is_main:
                _announce(recipe, mixture, world, start)
            stack.callback(mixture.close)
            loader = stack.enter_context(_loader(recipe, mixture, start, world))
            bad_samples = BadSampleList(
                recipe.data.max_bad_samples, known_bad, folder / BAD_SAMPLES if world.is_main else None
            )
            meta = {
                "format": CHECKPOINT_FORMAT,
                "card": card.model_dump(mode="json"),
                **identity,
                "incarnation": incarnation,
                "wandb_id": read_wandb_id(folder),
                "versions": versions(),
            }
            trainer = _trainer(
                recipe, folder, card, engine, checkpoints, meta, mixture, loader, bad_samples, monitor, world, stop
            )
            samples = trainer.run(start)
    except BaseException as error:
        _record_failure(folder, incarnation, world, error)
        raise
    stopped = samples < recipe.training.total_samples
    if world.is_main:
        write_outcome(folder, incarnation, "stopped" if stopped else "finished", samples=samples)
        if stopped:
            print(f"stopped on request at {samples:,} samples, all saved; run the same command again to go on")
    # A launcher may end all processes as soon as the first is gone: not before the outcome is written.
    world.barrier()
    return EXIT_STOPPED if stopped else 0


def _record_failure(folder: Path, incarnation: int, world: World, error: BaseException) -> None:
    """outcome.json says why; the first rank to fail has the cause. Never hides the error itself."""
    try:
        if not (folder / "outcome.json").exists():
            reason = f"rank {world.rank}: {type(error).__name__}: {error}"
            write_outcome(folder, incarnation, "failed", reason=reason)
    except PomscaleError as problem:
        print(f"warning: {problem}", file=sys.stderr)


def _open_mixture(recipe: TrainRecipe) -> Mixture:
    """The datasets of the recipe. InputError if they do not fit its codec and model."""
    if any(component.text is not None for component in recipe.data.components):
        raise InputError("data.text: this model is told classes, not captions, so it has no use for text embeddings")
    mixture = Mixture.open(recipe.data, seed=recipe.seed, global_batch=recipe.training.global_batch, read_text=False)
    for dataset in mixture.datasets:
        check_compatible(
            dataset.location, dataset.manifest, recipe.codec, recipe.model.latent_shape, recipe.model.num_classes
        )
    return mixture


def _check_indexes(mixture: Mixture, world: World) -> None:
    """A collective: rank 0 hashes, all hear. InputError if the index of a dataset is damaged."""
    problem = None
    if world.is_main:
        try:
            mixture.check_indexes()
        except InputError as error:
            problem = str(error)
    verdict = world.gather(problem)[0]
    if verdict is not None:
        raise InputError(str(verdict))


def _identity(recipe: TrainRecipe, mixture: Mixture) -> dict[str, Any]:
    """What decides every number of a run: goes into each checkpoint, and must be the same when it is resumed."""
    data = [
        {
            "path": dataset.location,
            "share": share,
            "fingerprint": dataset.manifest.fingerprint,
            "index": dataset.manifest.index.sha256,
        }
        for dataset, share in zip(mixture.datasets, mixture.shares, strict=True)
    ]
    return {"recipe": recipe.model_dump(mode="json"), "data": data}


def _monitor(recipe: TrainRecipe, folder: Path, incarnation: int, world: World) -> Monitor:
    """Rank 0 logs for all."""
    if not world.is_main:
        return Monitor([])
    return open_monitor(
        folder,
        recipe.monitoring,
        run_name=recipe.name,
        recipe_dump=recipe.model_dump(mode="json"),
        total_samples=recipe.training.total_samples,
        incarnation=incarnation,
    )


def _loader(recipe: TrainRecipe, mixture: Mixture, start: int, world: World) -> Loader[TrainBatch]:
    return Loader(
        mixture,
        micro_batch=recipe.training.micro_batch,
        rank=world.rank,
        world_size=world.size,
        start_position=start,
        num_threads=recipe.data.num_threads,
        prefetch=recipe.data.prefetch,
        finish=partial(_draw, recipe),
        pin_memory=world.device.type == "cuda",
    )


def _trainer(
    recipe: TrainRecipe,
    folder: Path,
    card: ModelCard,
    engine: Fsdp2Engine,
    checkpoints: CheckpointStore,
    checkpoint_meta: dict[str, Any],
    mixture: Mixture,
    loader: Loader[TrainBatch],
    bad_samples: BadSampleList,
    monitor: Monitor,
    world: World,
    stop: StopRequest,
) -> Trainer:
    training = recipe.training
    objective = build_objective(recipe.diffusion)
    return Trainer(
        engine=engine,
        batches=_steps(loader),
        loss=partial(_loss, objective, training.global_batch, world.device),
        learning_rate=lambda samples: learning_rate(
            recipe.schedule, recipe.optimizer.lr, samples, training.total_samples
        ),
        ema_weight=lambda samples: ema_weight(recipe.ema, samples, training.global_batch),
        checkpoints=checkpoints,
        checkpoint_meta=checkpoint_meta,
        bad_samples=bad_samples,
        epochs=partial(_epochs, mixture),
        events=_events(recipe, folder, card, objective, engine, monitor, world),
        monitor=monitor,
        host=HostStats(),
        mfu=_mfu(recipe, world),
        profiler=ProfileWindow(recipe.profile, folder, world.rank, world.device),
        world=world,
        stop=stop,
        global_batch=training.global_batch,
        total_samples=training.total_samples,
        log_every_samples=recipe.monitoring.every_samples,
        checkpoint_every_samples=recipe.checkpoint.every_samples,
    )


def open_heldout(
    path: str,
    card: ModelCard,
    *,
    reading: Literal["mapped", "streamed"] = "mapped",
    cache: CacheConfig | None = None,
    bad_samples: Literal["raise", "skip"] = "raise",
) -> LatentDataset:
    """A held-out set for the model of `card`, normalised as its training set was: the network knows no other space.

    `reading`, `cache` and `bad_samples` as in DataConfig. Raises InputError if it is missing or was encoded in another
    way.
    """
    manifest = read_manifest(path)
    check_compatible(path, manifest, card.codec, card.model.latent_shape, card.model.num_classes)
    if manifest.latent_codec.identity != card.codec_identity:
        raise InputError(f"dataset {path}: encoded with other weights than the training set; encode it again")
    return LatentDataset(path, manifest, card.normalization, reading=reading, cache=cache, bad_samples=bad_samples)


def _epochs(mixture: Mixture, samples: int) -> dict[str, float | str]:
    """To log: how often each dataset was gone through, and each bucket at least and at most."""
    metrics: dict[str, float | str] = {}
    for name, epochs in mixture.epochs(samples).items():
        of_this = f"/{name}" if len(mixture.names) > 1 else ""
        metrics[f"data/epoch{of_this}"] = epochs.mean
        if epochs.num_buckets > 1:
            metrics[f"data/epoch_min{of_this}"] = epochs.lowest
            metrics[f"data/epoch_max{of_this}"] = epochs.highest
    return metrics


def _steps(loader: Loader[TrainBatch]) -> Iterator[list[TrainBatch]]:
    while True:
        yield [next(loader) for _ in range(loader.num_micro_batches)]


def _draw(recipe: TrainRecipe, batch: MicroBatch) -> TrainBatch:
    """Runs in the loader's threads, so that drawing noise never keeps a GPU waiting."""
    diffusion = recipe.diffusion
    draws = draw(
        recipe.seed, batch.positions.tolist(), tuple(batch.latents.shape[1:]), diffusion.time, diffusion.class_dropout
    )
    condition = torch.where(draws.drop_condition, recipe.model.num_classes, batch.condition)
    return TrainBatch(batch.latents, draws.eps, draws.t, condition, batch.weights, batch.bad)


def _loss(objective: Objective, global_batch: int, device: torch.device, model: nn.Module, batch: TrainBatch) -> Tensor:
    """The micro-batch's share of the mean over the global batch, scalar fp32."""
    batch = batch.to(device)
    losses = per_sample_loss(objective, model, batch.x0, batch.eps, batch.t, batch.condition)
    return (losses * batch.weights).sum() / global_batch


def _resume(
    recipe: TrainRecipe,
    folder: Path,
    identity: dict[str, Any],
    card: ModelCard,
    engine: Fsdp2Engine,
    checkpoints: CheckpointStore,
    world: World,
) -> tuple[int, list[tuple[str, int]]]:
    """Load the newest complete checkpoint, if there is one; returns the samples it has seen, and the bad ones."""
    # Rank 0 looks, all ranks hear: a shared file system may show a new folder to some ranks later than to others.
    found = latest_checkpoint(folder / "checkpoints") if world.is_main else None
    latest: Any = world.gather(found)[0]
    if latest is None:
        return 0, []
    if recipe.resume == "never":
        raise InputError(f"{folder}: holds checkpoints, and resume is never; choose another name or delete the folder")
    meta = read_meta(latest)
    if meta["format"] != CHECKPOINT_FORMAT:
        raise InputError(
            f"{latest}: written by pomscale {meta['versions']['pomscale']}, whose runs this version ({__version__}) "
            f"cannot go on with; use that version, or choose another name"
        )
    _check_same_run(folder, identity, card, meta)
    checkpoints.load(latest, engine.state_dict())
    if world.is_main:
        print(f"resuming from {latest} ({meta['samples']:,} samples)")
    return meta["samples"], meta["bad_samples"]


def _check_same_run(folder: Path, now: dict[str, Any], card: ModelCard, then: dict[str, Any]) -> None:
    """`now`: the identity of the run that is started; `then`: the checkpoint's meta."""
    differences = [
        f"{'.'.join(keys)}: {_fixed(then, keys)} then, {_fixed(now, keys)} now"
        for keys in _FIXED_FOR_A_RUN
        if _fixed(then, keys) != _fixed(now, keys)
    ]
    shares_then, shares_now = ([data["share"] for data in identity["data"]] for identity in (then, now))
    if shares_then != shares_now:
        differences.append(f"data.mixture: shares of the samples {shares_then} then, {shares_now} now")
    else:
        differences += [
            f"the dataset at {new['path']}: its shards are not those of the run's start"
            for new, old in zip(now["data"], then["data"], strict=True)
            if new["fingerprint"] != old["fingerprint"]
        ] + [
            f"the dataset at {new['path']}: its index (labels, keys) is not that of the run's start"
            for new, old in zip(now["data"], then["data"], strict=True)
            if new["fingerprint"] == old["fingerprint"] and new["index"] != old["index"]
        ]
    latents_now = card.model_dump(mode="json", include=set(_LATENT_SPACE))
    differences += [
        f"{meaning}: {then['card'][key]} then, {latents_now[key]} now"
        for key, meaning in _LATENT_SPACE.items()
        if then["card"][key] != latents_now[key]
    ]
    if differences:
        raise InputError(
            f"{folder}: this run began with another recipe, so it cannot go on with this one. "
            f"Choose another name, or undo: {'; '.join(differences)}"
        )


def _fixed(identity: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The part of the recipe at `keys`, without where a codec lies and in which precision it would encode."""
    value = identity["recipe"]
    for key in keys:
        value = value.get(key)
    return {k: v for k, v in value.items() if k not in NOT_OF_THE_LATENTS} if keys == ("codec",) else value


def _announce(recipe: TrainRecipe, mixture: Mixture, world: World, start: int) -> None:
    training = recipe.training
    datasets = ", ".join(f"{len(dataset):,} samples in {dataset.location}" for dataset in mixture.datasets)
    print(
        f"{recipe.name}: {num_parameters(recipe.model) / 1e6:.1f} M parameters, "
        f"{training_flops(recipe.model) / 1e9:.2f} GFLOP per sample and step; {datasets}; "
        f"{world.size} x {world.device.type}, {recipe.compute.precision}; "
        f"{start:,} of {training.total_samples:,} samples done"
    )


def _mfu(recipe: TrainRecipe, world: World) -> Any:
    if world.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(), recipe.compute.precision)
    flops = training_flops(recipe.model)
    return None if peak is None else lambda samples_per_s: mfu(samples_per_s, flops, world.size, peak)


def _events(
    recipe: TrainRecipe,
    folder: Path,
    card: ModelCard,
    objective: Objective,
    engine: Fsdp2Engine,
    monitor: Monitor,
    world: World,
) -> list[Event]:
    """Validation and the grid of pictures, where the recipe asks for them."""
    events = []
    if recipe.validation is not None:
        data = recipe.data
        heldout = open_heldout(
            recipe.validation.path, card, reading=data.reading, cache=data.cache, bad_samples=data.bad_samples
        )
        events.append(
            Event(
                recipe.validation.every_samples,
                partial(_validate, recipe.validation, objective, engine.model, heldout, world),
            )
        )
    if recipe.sampling.every_samples is not None:
        # Loaded before the first step: a missing codec should fail now, not after an hour of training.
        codec = card.load_codec(world.device) if world.is_main else None
        draw_grid = partial(_draw_grid, recipe, folder, card, codec, objective, engine.model, monitor, world)
        events.append(Event(recipe.sampling.every_samples, draw_grid))
    return events


def _validate(
    config: ValidationConfig,
    objective: Objective,
    model: nn.Module,
    dataset: LatentDataset,
    world: World,
    samples: int,
) -> dict[str, float | str]:
    loss = heldout_loss(objective, model, read_in_order(dataset), len(dataset), config, world)
    bins = {validation_bin(i): value for i, value in enumerate(loss.by_bin) if value is not None}
    return {"validation/loss": loss.mean, "validation/bad_samples": loss.num_bad, **bins}


def read_in_order(dataset: LatentDataset) -> ReadRecords:
    """A reader of records by their place in the dataset, without flips; see evaluation.heldout.ReadRecords."""

    def read(indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        records = np.array(indices)
        samples = dataset.read(records, records, seed=0, flip_probability=0.0)
        weights = torch.ones(len(indices))
        weights[list(samples.bad)] = 0
        return samples.latents, samples.labels, weights

    return read


def _draw_grid(
    recipe: TrainRecipe,
    folder: Path,
    card: ModelCard,
    codec: Codec | None,
    objective: Objective,
    model: nn.Module,
    monitor: Monitor,
    world: World,
    samples: int,
) -> dict[str, float | str]:
    """A row of pictures per class into samples/: generated by all ranks, decoded by the one that has the codec."""
    config = recipe.sampling
    num_classes = recipe.model.num_classes
    latents = generate_on_all_ranks(
        objective, model, recipe.model.latent_shape, grid_classes(config, num_classes), num_classes, config, world
    )
    if codec is not None:
        path = folder / "samples" / f"samples-{samples:012d}.png"
        try:
            save_grid(codec.decode(card.denormalize(latents).to(world.device)), path, config.num_per_class)
        except OSError as error:  # a full disk costs a picture, not the run
            print(f"warning: {path} could not be written ({error}); training goes on", file=sys.stderr)
        else:
            monitor.log_image(samples, "samples/grid", path)
    return {}
