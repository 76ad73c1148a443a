"""Recipe -> everything the training loop uses -> the loop."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pomscale.base.clock import Clock
from pomscale.base.console import say, warn
from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import make_folder
from pomscale.checkpoint.store import CheckpointStore, read_meta
from pomscale.config.engine import CheckpointConfig
from pomscale.config.hardware import peak_flops
from pomscale.config.model import VideoModelConfig
from pomscale.config.train import TrainRecipe
from pomscale.data.bad_samples import BadSampleList
from pomscale.data.loader import Loader, ReadAhead
from pomscale.data.mixture import Mixture
from pomscale.diffusion.objectives import build_objective
from pomscale.distributed.compile_cache import CompileCache
from pomscale.distributed.preflight import preflight
from pomscale.distributed.stop import EXIT_STOPPED, StopRequest
from pomscale.distributed.stragglers import Stragglers
from pomscale.distributed.watchdog import Watchdog
from pomscale.distributed.world import World, join_world
from pomscale.engine import build_engine
from pomscale.engine.averages import ema_weights
from pomscale.engine.divergence import Divergence
from pomscale.engine.optimizers import learning_rate
from pomscale.engine.out_of_memory import explained_out_of_memory
from pomscale.engine.protocol import Engine, InitWeights
from pomscale.evaluation.heldout import shape_sizes
from pomscale.models import init_weights, make_model
from pomscale.monitoring.alerts import Alerts
from pomscale.monitoring.host import HostStats
from pomscale.monitoring.monitor import Monitor, open_monitor
from pomscale.monitoring.profiler import ProfileWindow
from pomscale.monitoring.throughput import mfu
from pomscale.monitoring.wandb.sink import read_wandb_id
from pomscale.plan.checks import check_layout
from pomscale.plan.model_cost import num_parameters, training_flops
from pomscale.pretrained.card import ModelCard
from pomscale.runs.checkpoint_folder import complete_checkpoints, final_folder, is_complete
from pomscale.runs.code_state import versions
from pomscale.runs.integrity import find_damage_of
from pomscale.runs.layout import BAD_SAMPLES_FILE, CHECKPOINT_META, CHECKPOINTS_FOLDER, EMA_FOLDER, stacks_path
from pomscale.runs.ledger import RESTARTED_BECAUSE, Ledger
from pomscale.runs.outcome import is_finished, write_outcome
from pomscale.runs.starts import Start, Superseded, record_start
from pomscale.shards.schema import check_compatible, check_text
from pomscale.training.initial_weights import FineTuning, fine_tuning
from pomscale.training.loss import TrainBatch, draw_batch, share_of_loss, steps
from pomscale.training.periodic import open_events
from pomscale.training.resume import CHECKPOINT_FORMAT, check_same_run, identity
from pomscale.training.trainer import Saving, Trainer

# torch compiles the blocks again for another mixer, another kind of shape (batch sizes, one frame group or several) and
# without gradients. After 8 of them it would run what is new uncompiled, and tell it in one line of a log.
_MOST_COMPILED_VARIANTS = 64


def train(recipe: TrainRecipe) -> int:
    """Train until the recipe's samples are seen, or until asked to stop. Returns the exit code (0, or 75 if stopped).

    Call it in every process of the run, alone or under torchrun. Raises PomscaleError with a message for people. Once
    the run is accepted as this folder's, outcome.json says how this incarnation ended, in any case but a kill.
    """
    stop = StopRequest()  # before anything slow, so that a signal during the start-up is not lost
    try:
        with join_world(recipe.compute.device, timeout=_collective_timeout(recipe)) as world:
            return _train_in(world, recipe, Path(recipe.output) / recipe.name, stop)
    finally:
        stop.restore()


def _collective_timeout(recipe: TrainRecipe) -> timedelta | None:
    """Later than the watchdog, which writes the stacks before it ends the run."""
    faults = recipe.faults
    if faults.hang_timeout_s is None:
        return None
    return timedelta(seconds=max(faults.hang_timeout_s, faults.slow_hang_timeout_s) + 600)


def _train_in(world: World, recipe: TrainRecipe, folder: Path, stop: StopRequest) -> int:
    """Looks before it writes: a run that another recipe may not go on with is left alone."""
    check_layout(recipe, world.size)
    mixture = _open_mixture(recipe)
    card = ModelCard.of(recipe, mixture)
    this_run = identity(recipe, mixture)
    standing = world.on_main(lambda: _look(recipe, folder, mixture, this_run, card))
    if standing.is_finished:
        if world.is_main:
            say(f"{folder}: finished already, {standing.samples:,} samples")
        return 0
    # A run that has begun does not need what it was fine-tuned from, which may be gone by now.
    is_new = standing.samples == 0
    initial = _fine_tuned(recipe, card, world) if is_new and recipe.init_from is not None else _seeded(recipe)
    world.on_main(lambda: make_folder(folder))
    number = world.on_main(lambda: _claim(folder).number)
    run = _Run(world, recipe, folder, Start(folder, number), stop)
    try:
        samples = run.train(mixture, card, this_run, initial)
    except BaseException as error:
        run.record_failure(error)
        raise
    stopped = samples < recipe.training.total_samples
    if world.is_main:
        run.record("stopped" if stopped else "finished", samples=samples)
        if stopped:
            say(f"stopped on request at {samples:,} samples, all saved; run the same command again to go on")
    # A launcher may end all processes as soon as the first is gone: not before the outcome is written.
    world.barrier()
    return EXIT_STOPPED if stopped else 0


def _claim(folder: Path) -> Start:
    """Whoever typed the command twice is told."""
    start = Start.claim(folder)
    if other := start.other_alive():
        warn(
            f"{folder}: another start of this run is still alive ({other}). This one goes on from its newest "
            "checkpoint, and the other stops without saving again; for a run of its own, give another name: name=..."
        )
    return start


@dataclass(frozen=True)
class _Standing:
    """How far a run is. samples: of its newest checkpoint, 0 without one."""

    samples: int
    is_finished: bool


def _look(recipe: TrainRecipe, folder: Path, mixture: Mixture, this_run: dict[str, Any], card: ModelCard) -> _Standing:
    """By rank 0. InputError if the run cannot go on in this way."""
    mixture.check_indexes()
    complete = complete_checkpoints(folder / CHECKPOINTS_FOLDER)
    if complete and recipe.resume == "never":
        raise InputError(f"{folder}: holds checkpoints, and resume is never; choose another name or delete the folder")
    for checkpoint in reversed(complete):
        if find_damage_of(checkpoint / CHECKPOINT_META) is not None:
            continue  # CheckpointStore.newest sets it aside, and says so
        meta = read_meta(checkpoint)
        check_same_run(folder, checkpoint, this_run, card, meta)
        samples: int = meta["samples"]
        return _Standing(samples, samples >= recipe.training.total_samples and is_finished(folder))
    return _Standing(0, False)


def _open_mixture(recipe: TrainRecipe) -> Mixture:
    """The datasets of the recipe. InputError if they do not fit its codec and model."""
    model = recipe.model
    mixture = Mixture.open(
        recipe.data,
        seed=recipe.seed,
        global_batch=recipe.training.global_batch,
        read_text=isinstance(model, VideoModelConfig),
    )
    for dataset in mixture.datasets:
        check_compatible(dataset.location, dataset.manifest, recipe.codec, model)
        if isinstance(model, VideoModelConfig) and dataset.text is not None:
            check_text(dataset.text.source.location, dataset.text.source.manifest, model)
    return mixture


def _seeded(recipe: TrainRecipe) -> InitWeights:
    return lambda model, assign: init_weights(model, recipe.seed, assign)


def _fine_tuned(recipe: TrainRecipe, card: ModelCard, world: World) -> InitWeights:
    assert recipe.init_from is not None
    initial = fine_tuning(recipe.init_from, recipe.model, recipe.seed)
    texts_then = initial.source.card.text
    if texts_then is not None and texts_then.identity != card.texts.identity:
        raise InputError(
            f"init_from: the network in {recipe.init_from.path} was told texts by another text encoder, that of "
            f"{texts_then.config.path}; encode the captions with it, e.g. into a companion set (data.text)"
        )
    world.on_main(lambda: initial.source.check(initial.weights))  # once, and not every byte on every rank
    return initial


class _Run:
    """One incarnation of a run, on one rank."""

    def __init__(self, world: World, recipe: TrainRecipe, folder: Path, start: Start, stop: StopRequest) -> None:
        self.world = world
        self.recipe = recipe
        self.folder = folder
        self.start = start
        self.stop = stop
        stop.on_quit = partial(self._record_bad_end, "quit")

    def record(self, state: str, *, samples: int | None = None, reason: str = "") -> None:
        """How this incarnation ended, as far as this rank knows. Superseded if a newer one has taken over."""
        self.start.check()
        write_outcome(self.folder, self.start.number, self.world.rank, state, samples=samples, reason=reason)

    def record_failure(self, error: BaseException) -> None:
        if not isinstance(error, Superseded):
            self._record_bad_end("failed", f"rank {self.world.rank}: {type(error).__name__}: {error}")

    def _record_bad_end(self, state: str, reason: str) -> None:
        """Never hides what has ended the run."""
        try:
            self.record(state, reason=reason)
        except (PomscaleError, OSError) as problem:
            warn(str(problem))

    def train(self, mixture: Mixture, card: ModelCard, this_run: dict[str, Any], initial: InitWeights) -> int:
        """Returns the samples seen."""
        recipe, world, faults = self.recipe, self.world, self.recipe.faults
        watchdog = Watchdog(
            faults.hang_timeout_s,
            faults.slow_hang_timeout_s,
            stacks_path(self.folder, self.start.number, world.rank),
            partial(self._record_bad_end, "hung"),
        )
        # The watchdog leaves first: what a log needs to be closed (wandb's upload) is no hang.
        with ExitStack() as stack, watchdog:
            compile_cache = CompileCache(self.folder if recipe.compute.compile else None, is_main=world.is_main)
            compile_cache.load()
            if recipe.compute.compile:
                torch._dynamo.config.recompile_limit = _MOST_COMPILED_VARIANTS
            engine = self._engine(initial)
            checkpoints = CheckpointStore(self.folder / CHECKPOINTS_FOLDER, recipe.checkpoint, self.start)
            restore = partial(_restore, engine, checkpoints)
            latest = checkpoints.newest()
            if latest is None and recipe.init_from is not None and not isinstance(initial, FineTuning):
                raise PomscaleError(
                    f"{self.folder}: all of its checkpoints are damaged; run the same command again to begin anew"
                )
            meta = None if latest is None else restore(latest)
            clock = Clock() if meta is None else Clock.of(meta)
            if world.is_main:
                self.start.check()
                record_start(self.folder, recipe, self.start.number, start_samples=clock.samples, num_ranks=world.size)
            ledger = stack.enter_context(
                Ledger(self.folder if world.is_main else None, self.start.number, clock.samples)
            )
            for damaged in checkpoints.damaged:
                ledger.event("damaged_checkpoint", clock.samples, path=str(damaged.folder), reason=damaged.reason)
            monitor = stack.enter_context(self._monitor())
            alerts = Alerts(recipe.monitoring.alerts, monitor, ledger)
            alerts.restarted(clock.samples, os.environ.get(RESTARTED_BECAUSE))
            watchdog.on_late = alerts.late
            self._announce(mixture, clock, latest, initial)
            self._preflight(clock, monitor)
            stack.callback(mixture.close)
            loader = stack.enter_context(self._loader(mixture, clock))
            known_bad = [] if meta is None else meta["bad_samples"]
            trainer = Trainer(
                engine=engine,
                batches=steps(loader),
                **self._schedules(),
                **self._evaluation(card, engine, monitor),
                **self._saving(checkpoints, card, this_run),
                restore=restore,
                bad_samples=BadSampleList(
                    recipe.data.max_bad_samples, known_bad, self.folder / BAD_SAMPLES_FILE if world.is_main else None
                ),
                epochs=partial(_epochs, mixture),
                monitor=monitor,
                ledger=ledger,
                alerts=alerts,
                host=HostStats(),
                mfu=_mfu(recipe, mixture, world),
                profiler=ProfileWindow(recipe.profile, self.folder, world.rank, world.device),
                world=world,
                stop=self.stop,
                watchdog=watchdog,
                divergence=Divergence(faults, None if meta is None else meta["divergence"]),
                stragglers=Stragglers(world),
                still_ours=self._still_ours,
                first_step_done=compile_cache.save,
                consistency_every_samples=faults.consistency_every_samples,
            )
            ledger.charge("start_up")
            with explained_out_of_memory(recipe, world.device, engine.resident_bytes):
                trainer.run(clock)
            compile_cache.save()
            return clock.samples

    def _still_ours(self) -> None:
        """Superseded if a newer start has taken over. A file system that stutters is no reason to end: whoever is about
        to commit something looks again.
        """
        if self.world.is_main:
            try:
                self.start.check()
            except Superseded:
                raise
            except PomscaleError as problem:
                warn(str(problem))

    def _engine(self, initial: InitWeights) -> Engine:
        with explained_out_of_memory(self.recipe, self.world.device, dict):
            with torch.device("meta"):
                model = make_model(self.recipe.model)
            return build_engine(self.recipe, model, initial, self.world)

    def _monitor(self) -> Monitor:
        """Rank 0 logs for all."""
        if not self.world.is_main:
            return Monitor([])
        return open_monitor(
            self.folder,
            self.recipe.monitoring,
            run_name=self.recipe.name,
            recipe_dump=self.recipe.model_dump(mode="json"),
            total_samples=self.recipe.training.total_samples,
            start=self.start.number,
        )

    def _announce(self, mixture: Mixture, clock: Clock, latest: Path | None, initial: InitWeights) -> None:
        if not self.world.is_main:
            return
        recipe, total = self.recipe, self.recipe.training.total_samples
        datasets = ", ".join(f"{len(dataset):,} samples in {dataset.location}" for dataset in mixture.datasets)
        say(
            f"{recipe.name}: {num_parameters(recipe.model) / 1e6:.1f} M parameters, "
            f"{mean_flops(recipe, mixture) / 1e9:.2f} GFLOP per sample and step; {datasets}; "
            f"{self.world.size} x {self.world.device.type}, {recipe.engine}, {recipe.compute.precision}; "
            f"{clock.samples:,} of {total:,} samples done"
        )
        if latest is not None:
            say(f"resuming from {latest} ({clock.samples:,} samples)")
        elif isinstance(initial, FineTuning):
            say(initial.note)

    def _preflight(self, clock: Clock, monitor: Monitor) -> None:
        if not self.recipe.faults.preflight:
            return
        found = preflight(self.world, self.folder, self.recipe.compute.precision)
        if self.world.is_main:
            say(found.line)
            for warning in found.warnings:
                warn(warning)
        monitor.log(clock.samples, dict(found.metrics))

    def _loader(self, mixture: Mixture, clock: Clock) -> Loader[TrainBatch]:
        return Loader(
            mixture,
            micro_batch=self.recipe.training.micro_batch,
            rank=self.world.rank,
            world_size=self.world.size,
            start_position=clock.position,
            ahead=ReadAhead(
                self.recipe.data.num_threads, self.recipe.data.prefetch, pin_memory=self.world.device.type == "cuda"
            ),
            finish=partial(draw_batch, self.recipe, texts=None if mixture.text is None else mixture.text.info),
        )

    def _schedules(self) -> dict[str, Any]:
        """What goes by samples seen."""
        recipe, training = self.recipe, self.recipe.training
        return {
            "learning_rate": lambda samples: learning_rate(
                recipe.schedule, recipe.optimizer.lr, samples, training.total_samples
            ),
            "ema_weights": lambda samples: ema_weights(recipe.ema, samples, training.global_batch),
            "global_batch": training.global_batch,
            "total_samples": training.total_samples,
            "log_every_samples": recipe.monitoring.every_samples,
        }

    def _evaluation(self, card: ModelCard, engine: Engine, monitor: Monitor) -> dict[str, Any]:
        objective = build_objective(self.recipe.diffusion)
        global_batch = self.recipe.training.global_batch
        return {
            "loss": partial(share_of_loss, objective, card.normalization, global_batch, self.world.device),
            "events": open_events(self.recipe, self.folder, card, objective, engine.model, monitor, self.world),
            "main_average": self.recipe.ema.main,
        }

    def _saving(self, checkpoints: CheckpointStore, card: ModelCard, this_run: dict[str, Any]) -> dict[str, Any]:
        post_hoc = self.recipe.ema.post_hoc
        snapshots = None
        if post_hoc is not None:
            powers = self.recipe.ema.averages[-len(post_hoc.widths) :]
            all_of_them = CheckpointConfig(
                every_samples=post_hoc.every_samples,
                keep_every_samples=1,
                asynchronous=self.recipe.checkpoint.asynchronous,
            )
            store = CheckpointStore(self.folder / EMA_FOLDER, all_of_them, self.start)
            snapshots = Saving(
                store,
                post_hoc.every_samples,
                part=lambda state: {"ema": {name: state["ema"][name] for name in powers}},
                holds=lambda samples: self.world.on_main(lambda: is_complete(final_folder(store.root, samples))),
            )
        return {
            "checkpoints": Saving(checkpoints, self.recipe.checkpoint.every_samples),
            "snapshots": snapshots,
            "checkpoint_meta": {
                "format": CHECKPOINT_FORMAT,
                "card": card.model_dump(mode="json"),
                **this_run,
                "incarnation": self.start.number,
                "wandb_id": read_wandb_id(self.folder),
                "versions": versions(),
            },
        }


def _restore(engine: Engine, checkpoints: CheckpointStore, folder: Path) -> dict[str, Any]:
    """Fill the engine from a checkpoint; returns its meta."""
    with engine.loading() as state:
        checkpoints.load(folder, state)
    return read_meta(folder)


def _epochs(mixture: Mixture, position: int) -> dict[str, float | str]:
    """To log: how often each dataset was gone through, and each bucket at least and at most."""
    metrics: dict[str, float | str] = {}
    for name, epochs in mixture.epochs(position).items():
        of_this = f"/{name}" if len(mixture.names) > 1 else ""
        metrics[f"data/epoch{of_this}"] = epochs.mean
        if epochs.num_buckets > 1:
            metrics[f"data/epoch_min{of_this}"] = epochs.lowest
            metrics[f"data/epoch_max{of_this}"] = epochs.highest
    return metrics


def mean_flops(recipe: TrainRecipe, mixture: Mixture) -> float:
    """Of training on a sample of the mixture, whose clips may be smaller than the largest."""
    model = recipe.model
    if not isinstance(model, VideoModelConfig) or mixture.text is None:
        return training_flops(model)
    total = 0.0
    for dataset, share in zip(mixture.datasets, mixture.shares, strict=True):
        for group, size in shape_sizes(dataset).items():
            channels, *frames, height, width = dataset.manifest.groups[group].shape
            shape = (channels, max([*frames, model.patch_frames]), height, width)
            clip = model.model_copy(update={"latent_shape": shape})
            flops = training_flops(
                clip,
                text_length=mixture.text.info.config.max_length,
                num_times=clip.num_groups if recipe.diffusion.time.per_frame_group else 1,
            )
            total += share * size / len(dataset) * flops
    return total


def _mfu(recipe: TrainRecipe, mixture: Mixture, world: World) -> Callable[[float], float] | None:
    if world.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(), recipe.compute.precision)
    flops = mean_flops(recipe, mixture)
    return None if peak is None else lambda samples_per_s: mfu(samples_per_s, flops, world.size, peak)
