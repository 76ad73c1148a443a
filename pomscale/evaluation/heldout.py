"""Held-out loss by time bin, with noise fixed once and for all.

The loss at a given t hardly moves by chance when noise and t are the same at every evaluation, so small progress shows;
and a mean over all t would hide that easy and hard times move differently.

Two losses are measured. The first is that of training, with t evenly over 0 to 1: its path, target and weight are the
objective's, so its figures cannot be compared over objectives. The second is the same for all of them, the error of v
of flow matching at noise scale 1 (see diffusion.common_loss): the same data and noise, mixed in the same proportions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pomscale.base.condition import Condition, map_condition
from pomscale.base.console import warn
from pomscale.base.errors import InputError
from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.checkpoint.store import find_checkpoint, read_meta
from pomscale.config.data import CacheConfig, DataConfig
from pomscale.config.train import ValidationConfig
from pomscale.data.dataset import LatentDataset
from pomscale.data.normalize import normalize
from pomscale.data.texts import text_batch
from pomscale.diffusion.common_loss import COMMON_TIMES, common_loss
from pomscale.diffusion.draws import keyed_normal
from pomscale.diffusion.objectives import Network, Objective, build_objective, per_sample_loss
from pomscale.distributed.world import World, join_world
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.load import load_pretrained
from pomscale.shards.class_names import check_same_classes
from pomscale.shards.schema import check_compatible, read_manifest

ReadRecords = Callable[[list[int]], tuple[Tensor, Condition, Tensor]]
"""Reader of records of a held-out set: numbers of records of one shape -> latents, condition, weights; on the CPU.

The latents are normalised, (b, ...) fp32. Weights (b,) fp32 are 1, or 0 for a record that cannot be read, whose loss
does not count.
"""


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean loss over the samples that could be read.

    Attributes:
        mean: Mean over all of them, of the loss of training.
        by_bin: Mean by time bin, of which bin 0 is nearest to the data; None if no sample of the bin could be read.
        v_mean: Mean of the loss that is the same for every objective.
        v_by_bin: Its mean by time bin; the bins divide COMMON_TIMES.
        num_bad: Number of samples that could not be read.
    """

    mean: float
    by_bin: list[float | None]
    v_mean: float
    v_by_bin: list[float | None]
    num_bad: int


@torch.no_grad()
def heldout_loss(
    objective: Objective,
    network: Network,
    read: ReadRecords,
    sizes: Sequence[int],
    config: ValidationConfig,
    world: World,
) -> HeldoutLoss:
    """Measure the losses of `config.num_samples` held-out samples; a collective, whose work all ranks share.

    Sample i always falls in bin i mod num_time_bins, at the same t (in a clip the same for all frames) and with the
    same noise. The network sees it twice, at t of its own path and at t between COMMON_TIMES of flow matching's.

    Args:
        objective: The objective that the network was trained with.
        network: The network, maybe sharded over the ranks.
        read: The reader of the held-out set.
        sizes: Number of samples of the first shape, of the second, and so on. The first samples of each shape are
            taken, in proportion.
        config: Numbers of samples and bins, and the seed.
        world: The ranks.

    Returns:
        The losses.

    Raises:
        InputError: None of the samples can be read.
    """
    num_samples, num_bins = min(config.num_samples, sum(sizes)), config.num_time_bins
    batches = _batches(sizes, num_samples, config.batch)
    sums = torch.zeros(3, num_bins, dtype=torch.float64)  # both losses, and weight, by bin
    for first in range(0, len(batches), world.size):
        # A sharded network computes on all ranks or on none: a rank that has run out repeats sample 0, uncounted.
        indices = batches[first + world.rank] if first + world.rank < len(batches) else []
        latents, condition, weights = read(indices or [0])
        latents, condition = latents.to(world.device), map_condition(condition, lambda part: part.to(world.device))
        losses = _fixed_losses(objective, network, latents, condition, indices or [0], config).double().cpu()
        if indices:
            bins, weights = torch.tensor(indices) % num_bins, weights.double()
            sums.index_add_(1, bins, torch.cat([losses * weights, weights[None]]))
    flat = torch.tensor(world.sum(sums.flatten().tolist()), dtype=torch.float64)
    own, common, counts = flat.view(3, num_bins).tolist()
    num_read = round(sum(counts))
    if num_read == 0:
        raise InputError(f"validation: none of the {num_samples:,} held-out samples can be read; repair the dataset")
    own_by_bin, common_by_bin = (
        [loss / count if count else None for loss, count in zip(losses, counts, strict=True)][: batches[-1][-1] + 1]
        for losses in (own, common)
    )
    return HeldoutLoss(sum(own) / num_read, own_by_bin, sum(common) / num_read, common_by_bin, num_samples - num_read)


def _batches(sizes: Sequence[int], num_samples: int, batch: int) -> list[list[int]]:
    """Return the numbers of `num_samples` samples in batches of one shape and at most `batch`."""
    batches, first, taken = [], 0, 0
    for size in sizes:
        up_to_here = num_samples * (first + size) // sum(sizes)
        end = first + up_to_here - taken
        batches += [list(range(start, min(start + batch, end))) for start in range(first, end, batch)]
        first, taken = first + size, up_to_here
    return batches


def _fixed_losses(
    objective: Objective,
    network: Network,
    x0: Tensor,
    condition: Condition,
    indices: list[int],
    config: ValidationConfig,
) -> Tensor:
    """Return both losses of each sample (2, b), with time and noise keyed by its number in the held-out set."""
    jitter = [keyed_generator(config.seed, Stream.VALIDATION_NOISE, i, subindex=1).random() for i in indices]
    bins = torch.tensor(indices) % config.num_time_bins
    t = (bins + torch.tensor(jitter, dtype=torch.float64)) / config.num_time_bins
    first, last = COMMON_TIMES
    own_t, flow_t = (times.float().to(x0.device) for times in (t, first + (last - first) * t))
    eps = keyed_normal(config.seed, Stream.VALIDATION_NOISE, indices, tuple(x0.shape[1:])).to(x0.device)
    own = per_sample_loss(objective, network, x0, eps, own_t, condition)
    return torch.stack([own, common_loss(objective, network, x0, eps, flow_t, condition)])


def open_heldout(
    path: str,
    card: ModelCard,
    *,
    reading: Literal["mapped", "streamed"] = "mapped",
    text: str | None = None,
    cache: CacheConfig | None = None,
    bad_samples: Literal["raise", "skip"] = "raise",
) -> LatentDataset:
    """Open a held-out set for the model of `card`, normalised as the model's training set was.

    Args:
        path: The dataset.
        card: The model's card.
        reading: See DataConfig.
        text: Companion set of its text embeddings; None = they are in its own shards.
        cache: See DataConfig.
        bad_samples: See DataConfig.

    Returns:
        The dataset.

    Raises:
        InputError: The dataset is missing, has other classes or was encoded in another way.
    """
    manifest = read_manifest(path)
    if card.text is None and card.class_names and manifest.latent is not None:
        there = "the set that the model was trained on"
        check_same_classes(f"dataset {path}", manifest.class_names, there, card.class_names)
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
    if dataset.text is not None and dataset.text.info.joint_identity != card.texts.joint_identity:
        raise InputError(
            f"dataset {dataset.text.source.location}: its captions went through another text encoder than those of the "
            "training set; encode them again"
        )
    return dataset


def shape_sizes(dataset: LatentDataset) -> dict[int, int]:
    """Return the number of records of each group (of one latent shape), in the order of the records."""
    sizes = Counter[int]()
    for shard in dataset.manifest.shards:
        sizes[shard.group] += shard.num_samples
    return dict(sizes)


def read_in_order(dataset: LatentDataset) -> ReadRecords:
    """Return a reader of records by their numbers in the dataset, without flips."""

    def read(indices: list[int]) -> tuple[Tensor, Condition, Tensor]:
        records = np.array(indices)
        samples = dataset.read(records, records, seed=0, flip_probability=0.0)
        weights = torch.ones(len(indices))
        weights[list(samples.bad)] = 0
        texts = dataset.text
        condition = samples.labels if texts is None else text_batch(samples, texts.info)
        return normalize(samples.latents, dataset.normalization), condition, weights

    return read


def measure_heldout(
    path: Path,
    *,
    data: str | None,
    text: str | None,
    num_samples: int | None,
    num_time_bins: int | None,
    weights: str,
    device: str,
) -> tuple[HeldoutLoss, str]:
    """Measure the held-out losses of a checkpoint outside of training (`pomscale evaluate heldout`), in fp32.

    None means the value of the recipe's validation section, or its default. For a run that trains in fp32, the recipe's
    own settings give the very figures that training logs.

    Args:
        path: A run folder or a checkpoint.
        data: The held-out set.
        text: Companion set of its texts; None = its own shards, or the recipe's companion set for validation.
        num_samples: Number of samples.
        num_time_bins: Number of time bins.
        weights: The weights to measure.
        device: "auto", "cpu" or "cuda".

    Returns:
        The losses, and the space of the first, see DiffusionConfig.loss_space.

    Raises:
        InputError: Neither `data` nor the recipe names a dataset, or it does not fit the model.
    """
    model = load_pretrained(path, weights=weights, device=device)
    recipe = read_meta(find_checkpoint(path))["recipe"]
    section, reading = recipe["validation"], DataConfig.model_validate(recipe["data"])
    if data is None and section is None:
        raise InputError(f"{path}: its recipe has no validation section; name a dataset with --data")
    changes = {"path": data, "text": text, "num_samples": num_samples, "num_time_bins": num_time_bins}
    config = ValidationConfig.model_validate(
        {"every_samples": 1, **(section or {}), **{key: value for key, value in changes.items() if value is not None}}
    )
    if data is not None and text is None and read_manifest(data).text is not None:
        config = config.model_copy(update={"text": None})  # the recipe's companion set belongs to the recipe's dataset
    dataset = open_heldout(
        config.path,
        model.card,
        text=config.text,
        reading=reading.reading,
        cache=reading.cache,
        bad_samples=reading.bad_samples,
    )
    with join_world(device) as world:
        objective = build_objective(model.card.diffusion)
        loss = heldout_loss(
            objective, model, read_in_order(dataset), list(shape_sizes(dataset).values()), config, world
        )
    if loss.num_bad:
        warn(f"{config.path}: {loss.num_bad} samples could not be read and do not count")
    return loss, model.card.diffusion.loss_space
