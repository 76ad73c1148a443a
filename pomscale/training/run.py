"""Life of a run: join the world, look how far the run is, claim the next start, train, record how it ended."""

from __future__ import annotations

import os
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from pomscale.base.console import say, warn
from pomscale.base.errors import PomscaleError
from pomscale.base.files import make_folder
from pomscale.checkpoint.store import CheckpointStore
from pomscale.config.train import TrainRecipe
from pomscale.distributed.compile_cache import CompileCache
from pomscale.distributed.preflight import preflight
from pomscale.distributed.stop import EXIT_STOPPED, StopRequest
from pomscale.distributed.watchdog import Watchdog
from pomscale.distributed.world import World, join_world
from pomscale.engine.out_of_memory import explained_out_of_memory
from pomscale.engine.protocol import InitWeights
from pomscale.monitoring.alerts import Alerts
from pomscale.monitoring.monitor import Monitor, open_monitor
from pomscale.plan.checks import check_layout, check_packing
from pomscale.plan.model_cost import num_parameters
from pomscale.runs.layout import CHECKPOINTS_FOLDER, stacks_path
from pomscale.runs.ledger import RESTARTED_BECAUSE, Ledger
from pomscale.runs.outcome import write_outcome
from pomscale.runs.starts import Start, Superseded, record_start
from pomscale.training.build import Inputs, build_trainer, make_engine, mean_flops, open_inputs, open_loader
from pomscale.training.initial_weights import FineTuning, fine_tuned, seeded
from pomscale.training.process import Process
from pomscale.training.resume import Resumed, find_standing, resume
from pomscale.training.telemetry import Records

# torch compiles the blocks again for another mixer, another kind of shape (batch sizes, one frame group or several) and
# without gradients. After 8 of them it would run new ones uncompiled, and say so only in one line of a log.
_MOST_COMPILED_VARIANTS = 64


def train(recipe: TrainRecipe, *, process_ends: bool = False) -> int:
    """Train until the recipe's samples are seen, or until a stop is requested; the exit code (0, or 75 if stopped).

    Call it in every process of the run, alone or under torchrun. Raises PomscaleError with a message for people. Once
    the recipe is accepted for the run folder, outcome.json tells how this start ended, except after a kill.

    Args:
        recipe: the run.
        process_ends: whether nothing follows in this process but a last line; see StopRequest.restore.
    """
    # Before anything slow, so that a signal during the start-up is not lost; while it waits for other ranks it ends.
    stop = StopRequest(nothing_to_save=True)
    try:
        with join_world(recipe.compute.device, timeout=_collective_timeout(recipe)) as world:
            stop.nothing_to_save = False
            return _train_in(world, recipe, Path(recipe.output) / recipe.name, stop)
    finally:
        stop.restore(process_ends=process_ends)


def _collective_timeout(recipe: TrainRecipe) -> timedelta | None:
    """Timeout of a collective: later than the watchdog, which writes the stacks before it ends the run."""
    faults = recipe.faults
    if faults.hang_timeout_s is None:
        return None
    return timedelta(seconds=max(faults.hang_timeout_s, faults.slow_hang_timeout_s) + 600)


def _train_in(world: World, recipe: TrainRecipe, folder: Path, stop: StopRequest) -> int:
    """Nothing is written before it is known that the recipe may continue the run in `folder`."""
    check_layout(recipe, world.size)
    inputs = open_inputs(recipe, folder, pin_memory=world.device.type == "cuda")
    check_packing(recipe, inputs.mixture.order.shapes, world.size)
    standing = world.on_main(lambda: find_standing(recipe, folder, inputs.mixture, inputs.identity, inputs.card))
    if standing.is_finished:
        if world.is_main:
            say(f"{folder}: finished already, {standing.samples:,} samples")
        return 0
    # A run that has begun does not need what it was fine-tuned from, which may have been deleted since.
    is_new = standing.samples == 0
    initial = fine_tuned(recipe, inputs.card, world) if is_new and recipe.init_from is not None else seeded(recipe)
    world.on_main(lambda: make_folder(folder))
    number = world.on_main(lambda: _claim(folder).number)
    run = _Run(world, folder, Start(folder, number), stop)
    try:
        samples = run.train(inputs, initial)
    except BaseException as error:
        run.record_failure(error)
        raise
    stopped = samples < recipe.training.total_samples
    if world.is_main:
        run.record("stopped" if stopped else "finished", samples=samples)
        if stopped:
            say(f"stopped on request at {samples:,} samples, all saved; run the same command again to continue")
    # A launcher may end all processes as soon as the first has ended: not before the outcome is written.
    world.barrier()
    return EXIT_STOPPED if stopped else 0


def _claim(folder: Path) -> Start:
    """Claim the next start of the run. Warn if another one is alive: the command may have been typed twice."""
    start = Start.claim(folder)
    if other := start.other_alive():
        warn(
            f"{folder}: another start of this run is still alive ({other}). This one continues from its newest "
            "checkpoint, and the other stops without saving again; for a run of its own, give another name: name=..."
        )
    return start


class _Run:
    """One start of a run, on one rank."""

    def __init__(self, world: World, folder: Path, start: Start, stop: StopRequest) -> None:
        self.world = world
        self.folder = folder
        self.start = start
        self.stop = stop
        stop.on_quit = partial(self._record_bad_end, "quit")

    def record(self, state: str, *, samples: int | None = None, reason: str = "") -> None:
        """Record how this start ended, as far as this rank knows. Superseded if a newer start has taken over."""
        self.start.check()
        write_outcome(self.folder, self.start.number, self.world.rank, state, samples=samples, reason=reason)

    def record_failure(self, error: BaseException) -> None:
        """Record that this start ended with an error, unless a newer start has taken over."""
        if not isinstance(error, Superseded):
            self._record_bad_end("failed", f"rank {self.world.rank}: {type(error).__name__}: {error}")

    def _record_bad_end(self, state: str, reason: str) -> None:
        """Record a bad end; where that fails too, only warn: the error that ended the run must not be hidden."""
        try:
            self.record(state, reason=reason)
        except (PomscaleError, OSError) as problem:
            warn(str(problem))

    def train(self, inputs: Inputs, initial: InitWeights) -> int:
        """Train, and return the samples seen."""
        recipe, faults = inputs.recipe, inputs.recipe.faults
        watchdog = Watchdog(
            faults.hang_timeout_s,
            faults.slow_hang_timeout_s,
            stacks_path(self.folder, self.start.number, self.world.rank),
            partial(self._record_bad_end, "hung"),
        )
        # The watchdog leaves first: what a log needs to be closed (wandb's upload) is no hang.
        with ExitStack() as stack, watchdog:
            compile_cache = self._load_compile_cache(recipe)
            resumed = self._resume(inputs, initial)
            clock = resumed.clock
            records = self._open_records(stack, inputs, resumed)
            watchdog.on_late = records.alerts.late
            self._announce(inputs, resumed, initial)
            self._preflight(recipe, records.monitor, clock.samples)
            stack.callback(inputs.mixture.close)
            loader = open_loader(inputs, self.world, clock.position)
            stack.callback(loader.close)
            process = Process(self.world, self.start, self.stop, watchdog, compile_cache.save)
            trainer = build_trainer(inputs, resumed, process, records, loader)
            records.ledger.charge("start_up")
            with explained_out_of_memory(recipe, self.world.device, resumed.engine.resident_bytes):
                trainer.run(clock)
            compile_cache.save()
            return clock.samples

    def _load_compile_cache(self, recipe: TrainRecipe) -> CompileCache:
        compile_cache = CompileCache(self.folder if recipe.compute.compile else None, is_main=self.world.is_main)
        compile_cache.load()
        if recipe.compute.compile:
            torch._dynamo.config.recompile_limit = _MOST_COMPILED_VARIANTS
        return compile_cache

    def _resume(self, inputs: Inputs, initial: InitWeights) -> Resumed:
        """The newest checkpoint, or the initial weights of a run that has none."""
        recipe = inputs.recipe
        engine = make_engine(recipe, initial, self.world)
        resumed = resume(engine, CheckpointStore(self.folder / CHECKPOINTS_FOLDER, recipe.checkpoint, self.start))
        if resumed.checkpoint is None and recipe.init_from is not None and not isinstance(initial, FineTuning):
            raise PomscaleError(
                f"{self.folder}: all of its checkpoints are damaged; run the same command again to start from init_from"
            )
        return resumed

    def _open_records(self, stack: ExitStack, inputs: Inputs, resumed: Resumed) -> Records:
        """Record this start in the run folder, and open what it writes to; `stack` closes it. Rank 0 writes for all."""
        world, recipe, samples = self.world, inputs.recipe, resumed.clock.samples
        if world.is_main:
            self.start.check()
            record_start(self.folder, recipe, self.start.number, start_samples=samples, num_ranks=world.size)
        ledger = stack.enter_context(Ledger(self.folder if world.is_main else None, self.start.number, samples))
        for damaged in resumed.checkpoints.damaged:
            ledger.event("damaged_checkpoint", samples, path=str(damaged.folder), reason=damaged.reason)
        monitor = stack.enter_context(self._monitor(recipe))
        alerts = Alerts(recipe.monitoring.alerts, monitor, ledger)
        alerts.restarted(samples, os.environ.get(RESTARTED_BECAUSE))
        return Records(monitor, ledger, alerts)

    def _monitor(self, recipe: TrainRecipe) -> Monitor:
        if not self.world.is_main:
            return Monitor([])
        return open_monitor(
            self.folder,
            recipe.monitoring,
            run_name=recipe.name,
            recipe_dump=recipe.model_dump(mode="json"),
            total_samples=recipe.training.total_samples,
            start=self.start.number,
            in_a_hurry=lambda: self.stop.requested,
        )

    def _announce(self, inputs: Inputs, resumed: Resumed, initial: InitWeights) -> None:
        if not self.world.is_main:
            return
        recipe, total, samples = inputs.recipe, inputs.recipe.training.total_samples, resumed.clock.samples
        datasets = ", ".join(f"{len(dataset):,} samples in {dataset.location}" for dataset in inputs.mixture.datasets)
        say(
            f"{recipe.name}: {num_parameters(recipe.model) / 1e6:.1f} M parameters, "
            f"{mean_flops(recipe, inputs.mixture) / 1e9:.2f} GFLOP per sample and step; {datasets}; "
            f"{self.world.size} x {self.world.device.type}, {recipe.engine}, {recipe.compute.precision}; "
            f"{samples:,} of {total:,} samples done"
        )
        if resumed.checkpoint is not None:
            say(f"resuming from {resumed.checkpoint} ({samples:,} samples)")
        elif isinstance(initial, FineTuning):
            say(initial.note)

    def _preflight(self, recipe: TrainRecipe, monitor: Monitor, samples: int) -> None:
        if not recipe.faults.preflight:
            return
        found = preflight(self.world, self.folder, recipe.compute.precision)
        if self.world.is_main:
            say(found.line)
            for warning in found.warnings:
                warn(warning)
        monitor.log(samples, dict(found.metrics))
