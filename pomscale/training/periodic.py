"""What happens beside training, every so many samples: validation, and pictures or clips to look at."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pomscale.base.condition import Condition, Text, map_condition
from pomscale.base.console import warn
from pomscale.base.errors import InputError, PomscaleError
from pomscale.codecs.base import Codec
from pomscale.config.data import CacheConfig
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.train import TrainRecipe, ValidationConfig
from pomscale.data.dataset import LatentDataset
from pomscale.data.normalize import normalize
from pomscale.diffusion.objectives import Objective
from pomscale.distributed.world import World
from pomscale.evaluation.heldout import ReadRecords, heldout_loss
from pomscale.media.sheets import check_clips_can_be_written, save_clips, save_grid
from pomscale.monitoring.monitor import Monitor
from pomscale.pretrained.card import DEFAULT_FPS, ModelCard, null_text
from pomscale.runs.layout import samples_path
from pomscale.runs.metric_names import validation_bin
from pomscale.sampling.on_ranks import generate_on_all_ranks, grid_classes
from pomscale.sampling.prompts import embed_prompts
from pomscale.shards.schema import check_compatible, read_manifest
from pomscale.training.loss import text_batch
from pomscale.training.trainer import Event


def open_events(
    recipe: TrainRecipe,
    folder: Path,
    card: ModelCard,
    objective: Objective,
    model: nn.Module,
    monitor: Monitor,
    world: World,
) -> list[Event]:
    """Validation, and pictures or clips, where the recipe asks for them. InputError if what they need is missing."""
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
        conditions = _conditions(recipe, card, world)
        events.append(
            Event(
                "sampling",
                recipe.sampling.every_samples,
                partial(_draw, recipe, folder, card, codec, objective, model, conditions, monitor, world),
            )
        )
    return events


@dataclass(frozen=True)
class _Conditions:
    """What to draw, and what says nothing: a batch of n, and one of 1."""

    asked: Condition
    nothing: Condition


def _conditions(recipe: TrainRecipe, card: ModelCard, world: World) -> _Conditions:
    """A collective. InputError if the text encoder is missing."""
    config = recipe.sampling
    if isinstance(recipe.model, ImageModelConfig):
        num_classes = recipe.model.num_classes
        return _Conditions(torch.tensor(grid_classes(config, num_classes)), torch.tensor([num_classes]))

    check_clips_can_be_written()

    def embed() -> Text:
        # Once and for all: a text encoder may be larger than the network, and is gone when training begins.
        return embed_prompts(card.load_text_encoder(world.device), config.prompts)

    prompts = world.on_main(embed)
    each = [row for row in range(len(config.prompts)) for _ in range(config.num_each)]
    return _Conditions(map_condition(prompts, lambda part: part[each]), null_text(card.texts))


def open_heldout(
    path: str,
    card: ModelCard,
    *,
    reading: Literal["mapped", "streamed"] = "mapped",
    text: str | None = None,
    cache: CacheConfig | None = None,
    bad_samples: Literal["raise", "skip"] = "raise",
) -> LatentDataset:
    """A held-out set for the model of `card`, normalised as its training set was: the network knows no other space.

    `text`: its companion set of text embeddings, None = they are in its own shards. `reading`, `cache` and
    `bad_samples` as in DataConfig. Raises InputError if it is missing or was encoded in another way.
    """
    manifest = read_manifest(path)
    check_compatible(path, manifest, card.codec, card.model)
    if card.codec_identity is not None and manifest.latent_codec.identity != card.codec_identity:
        raise InputError(f"dataset {path}: encoded with other weights than the training set; encode it again")
    dataset = LatentDataset(
        path,
        manifest,
        card.normalization,
        text=None if card.text is None else text or path,
        reading=reading,
        cache=cache,
        bad_samples=bad_samples,
    )
    if dataset.text is not None and dataset.text.info.identity != card.texts.identity:
        raise InputError(
            f"dataset {dataset.text.source.location}: its captions went through another text encoder than those of the "
            "training set; encode them again"
        )
    return dataset


def shape_sizes(dataset: LatentDataset) -> dict[int, int]:
    """How many records each group (of one latent shape) has, in the order in which they lie."""
    sizes = Counter[int]()
    for shard in dataset.manifest.shards:
        sizes[shard.group] += shard.num_samples
    return dict(sizes)


def read_in_order(dataset: LatentDataset) -> ReadRecords:
    """A reader of records by their place in the dataset, without flips; see evaluation.heldout.ReadRecords."""

    def read(indices: list[int]) -> tuple[Tensor, Condition, Tensor]:
        records = np.array(indices)
        samples = dataset.read(records, records, seed=0, flip_probability=0.0)
        weights = torch.ones(len(indices))
        weights[list(samples.bad)] = 0
        texts = dataset.text
        condition = samples.labels if texts is None else text_batch(samples, texts.info)
        return normalize(samples.latents, dataset.normalization), condition, weights

    return read


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
    return {"validation/loss": loss.mean, "validation/bad_samples": loss.num_bad, **bins}


def _draw(
    recipe: TrainRecipe,
    folder: Path,
    card: ModelCard,
    codec: Codec | None,
    objective: Objective,
    model: nn.Module,
    conditions: _Conditions,
    monitor: Monitor,
    world: World,
    samples: int,
) -> dict[str, float | str]:
    """A row of pictures per class, or of clips per prompt, into samples/: generated by all ranks, decoded by the one
    that has the codec. Clips have all frames generated at once, which every network can.
    """
    config, network = recipe.sampling, recipe.model
    shape: tuple[int, ...] = network.latent_shape
    group_frames = None
    if isinstance(network, VideoModelConfig):
        channels, num_frames, *size = network.latent_shape
        shape, group_frames = (channels, config.num_frames or num_frames, *size), network.patch_frames
    latents = generate_on_all_ranks(
        objective, model, shape, conditions.asked, conditions.nothing, config, world, group_frames
    )
    if codec is not None:
        show = _show_grid if group_frames is None else _show_clips
        path = samples_path(folder, samples)
        decoded = codec.decode(card.denormalize(latents).to(world.device))
        try:
            show(decoded, path, config.num_each, card, monitor, samples)
        except PomscaleError as error:  # a full disk costs what was drawn, not the run
            warn(f"{path} could not be written ({error}); training goes on")
    return {}


def _show_grid(
    images: Tensor, picture: Path, num_columns: int, card: ModelCard, monitor: Monitor, samples: int
) -> None:
    save_grid(images, picture, num_columns)
    monitor.log_image(samples, "samples/grid", picture)


def _show_clips(clips: Tensor, sheet: Path, num_columns: int, card: ModelCard, monitor: Monitor, samples: int) -> None:
    film = sheet.with_suffix(".mp4")
    save_clips(clips, film, sheet, num_columns=num_columns, fps=card.fps or DEFAULT_FPS)
    monitor.log_video(samples, "samples/clips", film)
    monitor.log_image(samples, "samples/sheet", sheet)
