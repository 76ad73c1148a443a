"""The training data of a run: one dataset or several, in one order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.config.data import DataConfig
from pomscale.data.dataset import LatentDataset, Samples
from pomscale.data.mixture_order import MixtureOrder
from pomscale.data.readers.features import FeaturesReader
from pomscale.data.readers.shard_files import check_room
from pomscale.data.readers.texts import TextReader
from pomscale.shards.class_names import check_same_classes
from pomscale.shards.schema import Manifest, Normalization, check_has_latents, read_manifest

_SAME_TEXT = "Encode one of them again with the other's text encoder"
_SAME_FEATURES = "Encode one of them again with the other's features section"


@dataclass(frozen=True, slots=True)
class Epochs:
    """Passes through a dataset, and through the buckets (latent shapes) that had the fewest and the most."""

    mean: float
    lowest: float
    highest: float
    num_buckets: int

    @classmethod
    def of(cls, buckets: Sequence[tuple[int, int]]) -> Epochs:
        """Return the passes, given samples drawn from and records of each bucket."""
        drawn, sizes = zip(*buckets, strict=True)
        passes = [count / size for count, size in buckets]
        return cls(sum(drawn) / sum(sizes), min(passes), max(passes), len(passes))


class Mixture:
    """Samples by their global position, from one dataset or several."""

    def __init__(
        self,
        datasets: Sequence[LatentDataset],
        weights: Sequence[float],
        *,
        seed: int,
        global_batch: int,
        shuffle_window: int,
        flip_probability: float,
    ) -> None:
        """Mix datasets. Raises InputError if one is empty.

        Args:
            datasets: The datasets, normalised in the same way.
            weights: Share of the samples per dataset, relative to each other.
            seed: Seed of the run.
            global_batch: Samples per step; 1 for the order of packed steps.
            shuffle_window: Records that are shuffled together.
            flip_probability: Share of flipped copies, where the datasets have them.
        """
        for dataset in datasets:
            if len(dataset) == 0:
                raise InputError(f"dataset {dataset.location}: has no records, so there is nothing to train on")
        self.datasets = datasets
        self.shares = [weight / math.fsum(weights) for weight in weights]
        self.names = _names([dataset.location for dataset in datasets])
        self.order = MixtureOrder(
            [dataset.manifest for dataset in datasets],
            weights,
            seed=seed,
            global_batch=global_batch,
            window=shuffle_window,
        )
        self._seed = seed
        self._flip_probability = flip_probability
        self._reads_ahead = any(dataset.reads_ahead for dataset in datasets)
        self._reading: tuple[int, int, int] | None = None
        self._announced: list[list[int]] = [[] for _ in datasets]

    @classmethod
    def open(
        cls,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        read_text: bool,
        pin_memory: bool = False,
        features_until: int | None = None,
    ) -> Mixture:
        """Open the datasets of a recipe, all normalised in the same way; with `pin_memory`, pixels are read for a GPU.

        features_until: global position from which on no features are read; None = none. Raises InputError if a set is
        missing, unfinished or damaged, if they do not belong together, or if the shards of two windows do not fit into
        the cache, or into memory where they are streamed.
        """
        components = config.components
        manifests = [read_manifest(component.path) for component in components]
        weights = [component.weight for component in components]
        _check_belong_together([component.path for component in components], manifests, read_classes=not read_text)
        normalization = Normalization.of_mixture(manifests, weights, config.normalization)
        datasets = [
            LatentDataset(
                component.path,
                manifest,
                normalization,
                text=(component.text or component.path) if read_text else None,
                reading=config.reading,
                cache=config.cache,
                bad_samples=config.bad_samples,
                pin_memory=pin_memory,
            )
            for component, manifest in zip(components, manifests, strict=True)
        ]
        for component, dataset in zip(components, datasets, strict=True):
            if component.features is not None:
                dataset.read_features(component.features, flips=config.flip_probability > 0, until=features_until)
        _check_same_text(datasets)
        _check_same_features(datasets)
        mixture = cls(
            datasets,
            weights,
            seed=seed,
            global_batch=global_batch,
            shuffle_window=config.shuffle_window,
            flip_probability=config.flip_probability,
        )
        two_windows = zip(datasets, mixture.order.shards_ahead(0, 0), strict=True)
        num_bytes = sum(dataset.num_bytes(shards) for dataset, shards in two_windows)
        check_room(num_bytes, config.shuffle_window, config.reading, config.cache)
        return mixture

    @property
    def normalization(self) -> Normalization:
        return self.datasets[0].normalization

    @property
    def text(self) -> TextReader | None:
        """Text reader of the first dataset, whose encoder and null embedding all have; None if texts are not read."""
        return self.datasets[0].text

    @property
    def features(self) -> FeaturesReader | None:
        """Features reader of the first dataset, whose teacher and grid all have; None if features are not read."""
        return self.datasets[0].features

    @property
    def fps(self) -> float | None:
        """Frames per second of all clips; None if there are none."""
        return next((dataset.manifest.fps for dataset in self.datasets if dataset.manifest.fps is not None), None)

    def read(self, positions: np.ndarray) -> Samples:
        """Return the samples at global positions (b,) int64 of one shape. Raises the errors of `LatentDataset.read`."""
        parts: list[tuple[np.ndarray, Samples]] = []
        for part in self.order.parts(positions):
            dataset = self.datasets[self.order.components[part.component].dataset]
            samples = dataset.read(
                part.records, positions[part.rows], seed=self._seed, flip_probability=self._flip_probability
            )
            parts.append((part.rows, samples))
        return parts[0][1] if len(parts) == 1 else _merge(len(positions), parts)

    def will_need(self, oldest: int, newest: int, last: int) -> None:
        """Announce that the steps from position `oldest` to that from `newest` to `last` are being read.

        Returns at once. Called by one thread at a time.
        """
        if not self._reads_ahead or (oldest, newest, last) == self._reading:
            return
        self._reading = (oldest, newest, last)
        ahead = self.order.shards_ahead(oldest, newest, last)
        for dataset, now, before in zip(self.datasets, ahead, self._announced, strict=True):
            if now != before:
                dataset.will_need(now, oldest)
        self._announced = ahead

    def epochs(self, num_samples: int) -> dict[str, Epochs]:
        """Return the passes through each dataset, by name, after `num_samples` samples."""
        counts = self.order.epochs(num_samples)
        return {name: Epochs.of(of_buckets) for name, of_buckets in zip(self.names, counts, strict=True)}

    def check_indexes(self) -> None:
        """Hash the indexes. Raises InputError, naming the remedy, if one is not what its manifest says."""
        for dataset in self.datasets:
            dataset.check_indexes()

    def close(self) -> None:
        for dataset in self.datasets:
            dataset.close()


def _merge(batch: int, parts: Sequence[tuple[np.ndarray, Samples]]) -> Samples:
    """Return one batch, with the rows of each part at their positions in it."""
    targets = [torch.from_numpy(rows) for rows, _ in parts]

    def scattered(tensors: Sequence[Tensor]) -> Tensor:
        out = tensors[0].new_zeros((batch, *tensors[0].shape[1:]))
        for rows, tensor in zip(targets, tensors, strict=True):
            out[rows] = tensor
        return out

    texts = [samples.text for _, samples in parts if samples.text is not None]
    lengths = [samples.text_lengths for _, samples in parts if samples.text_lengths is not None]
    longest = max((text.shape[1] for text in texts), default=0)
    features = [samples.features for _, samples in parts if samples.features is not None]
    padded = [torch.nn.functional.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts]
    return Samples(
        latents=scattered([samples.latents for _, samples in parts]),
        labels=scattered([samples.labels for _, samples in parts]),
        text=scattered(padded) if texts else None,
        text_lengths=scattered(lengths) if texts else None,
        bad={int(rows[row]): sample for rows, samples in parts for row, sample in samples.bad.items()},
        features=scattered(features) if features else None,
    )


def _names(locations: Sequence[str]) -> list[str]:
    """Return the last parts of the locations, with a number in front where two of them are equal."""
    names = [PurePosixPath(location).name for location in locations]
    return names if len(set(names)) == len(names) else [f"{i}-{name}" for i, name in enumerate(names)]


def _check_belong_together(locations: Sequence[str], manifests: Sequence[Manifest], *, read_classes: bool) -> None:
    """Raise InputError if one network and one codec cannot serve all datasets of a mixture."""
    for location, manifest in zip(locations, manifests, strict=True):
        check_has_latents(location, manifest)
    first = manifests[0]
    for location, manifest in zip(locations[1:], manifests[1:], strict=True):
        both = f"data.mixture: {locations[0]} and {location}"
        if manifest.latents.dtype != first.latents.dtype:
            kinds = [m.latent_codec.config.name for m in (first, manifest)]
            raise InputError(
                f"{both}: one holds pixels (uint8) and the other latents (codecs {kinds[0]} and {kinds[1]}), and a "
                f"network learns one of the two. Encode one of them again with the other's codec"
            )
        channels = [m.latents.num_channels for m in (first, manifest)]
        if channels[0] != channels[1]:
            raise InputError(
                f"{both}: their latents have {channels[0]} and {channels[1]} channels. "
                f"Encode one of them again with the other's codec"
            )
        if manifest.latent_codec.identity != first.latent_codec.identity:
            raise InputError(f"{both}: their codecs differ in weights. Encode one of them again with the other's")
        if read_classes:
            check_same_classes(
                f"dataset {location}", manifest.class_names, f"dataset {locations[0]}", first.class_names
            )
    clips = [(location, m.fps) for location, m in zip(locations, manifests, strict=True) if m.fps is not None]
    for location, fps in clips[1:]:
        if fps != clips[0][1]:
            raise InputError(
                f"data.mixture: {clips[0][0]} and {location}: their clips have {clips[0][1]:g} and {fps:g} frames per "
                f"second, which the network does not know. Encode one of them again with the other's transform.fps"
            )


def _check_same_text(datasets: Sequence[LatentDataset]) -> None:
    """Raise InputError if one network cannot read all embeddings of a mixture."""
    first = datasets[0].text
    for dataset in datasets[1:]:
        other = dataset.text
        if first is None or other is None:
            continue
        both = f"data.mixture: the texts in {first.source.location} and {other.source.location}"
        if other.info.width != first.info.width:
            raise InputError(
                f"{both}: their embeddings have {first.info.width} and {other.info.width} values per token. "
                f"{_SAME_TEXT}"
            )
        if other.info.joint_identity != first.info.joint_identity:
            raise InputError(f"{both}: their text encoders differ in weights. {_SAME_TEXT}")
        kept, also_kept = (
            " + ".join(str(encoder.config.max_length) for encoder in texts.info.encoders) for texts in (first, other)
        )
        if also_kept != kept:
            raise InputError(
                f"{both}: of their captions up to {kept} and {also_kept} tokens were kept. Encode one of them again "
                "with the other's text.max_length"
            )


def _check_same_features(datasets: Sequence[LatentDataset]) -> None:
    """Raise InputError if the features of a mixture are of several teachers or grids."""
    readers = [dataset.features for dataset in datasets if dataset.features is not None]
    for other in readers[1:]:
        first = readers[0]
        both = f"data.mixture: the features in {first.source.location} and {other.source.location}"
        for name, one, another in (
            ("grids", first.info.grid, other.info.grid),
            ("teachers", first.info.teacher, other.info.teacher),
            ("values per token", first.info.dim, other.info.dim),
        ):
            if one != another:
                raise InputError(f"{both}: their {name} are {one} and {another}. {_SAME_FEATURES}")
        if first.info.identity != other.info.identity:
            raise InputError(f"{both}: their teachers differ in weights or preprocessing. {_SAME_FEATURES}")
