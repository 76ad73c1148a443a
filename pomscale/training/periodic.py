"""Periodic work of training: checks of the replicas, validation, and pictures or clips to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pomscale.base.clock import Clock
from pomscale.base.condition import Condition, Text, map_condition
from pomscale.base.console import warn
from pomscale.base.errors import PomscaleError
from pomscale.codecs.base import Codec
from pomscale.config.model import VideoModelConfig
from pomscale.config.time_shift import time_shift
from pomscale.config.train import TrainRecipe, ValidationConfig
from pomscale.data.dataset import LatentDataset
from pomscale.data.texts import null_text
from pomscale.diffusion.objectives import Objective
from pomscale.distributed.consistency import check_replicas
from pomscale.distributed.world import World
from pomscale.engine.protocol import Engine
from pomscale.evaluation.heldout import heldout_loss, open_heldout, read_in_order, shape_sizes
from pomscale.media.sheets import check_clips_can_be_written, save_clips, save_grid
from pomscale.monitoring.monitor import Monitor
from pomscale.pretrained.card import DEFAULT_FPS, ModelCard
from pomscale.runs.layout import samples_path
from pomscale.runs.metric_names import validation_bin
from pomscale.sampling.on_ranks import generate_on_all_ranks, grid_classes
from pomscale.sampling.prompts import embed_prompts
from pomscale.training.process import Process
from pomscale.training.schedule import Schedule
from pomscale.training.telemetry import Records


@dataclass(frozen=True)
class Event:
    """Something that happens every so many samples, and at the end of the run: validation, a grid of pictures.

    `run(samples)` is a collective, computes with averaged weights, and returns metrics to log.
    """

    name: str
    every_samples: int
    run: Callable[[int], dict[str, float | str]]


@dataclass(frozen=True)
class PeriodicWork:
    """Runs the events that are due with the average of the recipe, and compares the replicas of the weights.

    record_metrics(samples, metrics): tells the checkpoint store what was measured. consistency_every_samples: None if
    replicas are not compared.
    """

    events: Sequence[Event]
    record_metrics: Callable[[int, dict[str, float | str]], None]
    consistency_every_samples: int | None
    engine: Engine
    average: str
    schedule: Schedule
    process: Process
    records: Records

    def check_replicas(self, clock: Clock) -> None:
        """Compare the ranks that hold copies of the same numbers, if that is due. Raises PomscaleError if they differ.

        A collective.
        """
        every = self.consistency_every_samples
        if every is not None and self.schedule.is_due(every, clock):
            replicas = self.engine.replicas()
            if replicas is not None:
                check_replicas(self.process.world, replicas.group, replicas.tensors)

    def run_events(self, clock: Clock) -> None:
        """Run the events that are due, and all of them at the end of the run. A collective."""
        samples = clock.samples
        for event in self.events:
            if self.schedule.is_over(samples) or self.schedule.is_due(event.every_samples, clock):
                with self.process.watchdog.slow(event.name), self.engine.averaged(self.average):
                    metrics = event.run(samples)
                self.records.monitor.log(samples, metrics)
                self.record_metrics(samples, metrics)
                self.records.ledger.charge("evaluation")


def open_events(
    recipe: TrainRecipe,
    folder: Path,
    card: ModelCard,
    objective: Objective,
    model: nn.Module,
    monitor: Monitor,
    world: World,
) -> list[Event]:
    """Validation, and pictures or clips, where the recipe asks for them. A collective.

    folder: of the run. model: as the engine has it. Raises InputError if what the events need is missing.
    """
    events = []
    if recipe.validation is not None:
        data = recipe.data
        heldout = open_heldout(
            recipe.validation.path,
            card,
            text=recipe.validation.text,
            reading=data.reading,
            cache=data.cache,
            bad_samples=data.bad_samples,
        )
        validate = partial(_validate, recipe.validation, objective, model, heldout, world)
        events.append(Event("validation", recipe.validation.every_samples, validate))
    if recipe.sampling.every_samples is not None:
        # Loaded before the first step: a missing codec should fail now, not after an hour of training.
        codec = card.load_codec(world.device) if world.is_main else None
        display = None if codec is None else _Display(folder, card, codec, monitor, recipe.sampling.num_each)
        draw = _Samples(recipe, objective, model, _conditions(recipe, card, world), world, display)
        events.append(Event("sampling", recipe.sampling.every_samples, draw))
    return events


@dataclass(frozen=True)
class _Conditions:
    """Conditions of the samples to draw, a batch of n, and the null condition, a batch of 1."""

    wanted: Condition
    null: Condition


def _conditions(recipe: TrainRecipe, card: ModelCard, world: World) -> _Conditions:
    """Conditions of the recipe's samples. A collective. Raises InputError if the text encoder is missing."""
    config = recipe.sampling
    if isinstance(recipe.model, VideoModelConfig):
        check_clips_can_be_written()
    elif recipe.model.num_classes is not None:
        num_classes = recipe.model.num_classes
        return _Conditions(torch.tensor(grid_classes(config, num_classes)), torch.tensor([num_classes]))

    def embed() -> Text:
        # Once, before training begins: a text encoder may be larger than the network.
        return embed_prompts(card.load_text_encoder(world.device), config.prompts)

    prompts = world.on_main(embed)
    each = [row for row in range(len(config.prompts)) for _ in range(config.num_each)]
    return _Conditions(map_condition(prompts, lambda part: part[each]), null_text(card.texts))


def _validate(
    config: ValidationConfig,
    objective: Objective,
    model: nn.Module,
    dataset: LatentDataset,
    world: World,
    samples: int,
) -> dict[str, float | str]:
    loss = heldout_loss(objective, model, read_in_order(dataset), list(shape_sizes(dataset).values()), config, world)
    bins = {validation_bin(i): value for i, value in enumerate(loss.by_bin) if value is not None}
    means: dict[str, float | str] = {"validation/loss": loss.mean, "validation/v_loss": loss.v_mean}
    return {**means, "validation/bad_samples": loss.num_bad, **bins}


@dataclass(frozen=True)
class _Display:
    """Decodes generated samples, writes them into the run folder and logs them. A row per class or prompt."""

    folder: Path
    card: ModelCard
    codec: Codec
    monitor: Monitor
    num_each: int

    def show(self, latents: Tensor, samples: int, device: torch.device) -> None:
        """Show pictures (n c h w) or clips (n c f h w), normalised latents of the training clock `samples`."""
        path = samples_path(self.folder, samples)
        decoded = self.codec.decode(self.card.denormalize(latents).to(device))
        show = self._show_pictures if latents.ndim == 4 else self._show_clips
        try:
            show(decoded, path, samples)
        except PomscaleError as error:  # a full disk costs what was drawn, not the run
            warn(f"{path} could not be written ({error}); training continues")

    def _show_pictures(self, pictures: Tensor, grid: Path, samples: int) -> None:
        save_grid(pictures, grid, self.num_each)
        self.monitor.log_image(samples, "samples/grid", grid)

    def _show_clips(self, clips: Tensor, sheet: Path, samples: int) -> None:
        video = sheet.with_suffix(".mp4")
        save_clips(clips, video, sheet, num_columns=self.num_each, fps=self.card.fps or DEFAULT_FPS)
        self.monitor.log_video(samples, "samples/clips", video)
        self.monitor.log_image(samples, "samples/sheet", sheet)


@dataclass(frozen=True)
class _Samples:
    """Draws pictures or clips: generated by all ranks, shown by the one that has a display.

    All frames of a clip are generated at once, which every network can.
    """

    recipe: TrainRecipe
    objective: Objective
    model: nn.Module
    conditions: _Conditions
    world: World
    display: _Display | None

    def __call__(self, samples: int) -> dict[str, float | str]:
        config, network = self.recipe.sampling, self.recipe.model
        shape: tuple[int, ...] = network.latent_shape
        group_frames = None
        if isinstance(network, VideoModelConfig):
            channels, num_frames, *size = network.latent_shape
            shape, group_frames = (channels, config.num_frames or num_frames, *size), network.patch_frames
        config = config.shifted_as(time_shift(self.recipe.diffusion, network, shape))
        conditions = self.conditions
        latents = generate_on_all_ranks(
            self.objective, self.model, shape, conditions.wanted, conditions.null, config, self.world, group_frames
        )
        if self.display is not None:
            self.display.show(latents, samples, self.world.device)
        return {}
