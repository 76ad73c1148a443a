"""What a run trains on: one dataset or several, in one order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
import torch
from torch import Tensor

from pomscale.config.schema import DataConfig
from pomscale.data.dataset import LatentDataset, Samples
from pomscale.data.mixture_order import MixtureOrder
from pomscale.data.schema import Manifest, Normalization, read_manifest
from pomscale.errors import InputError


class Mixture:
    """Samples by their global position. `weights`: share of the samples per dataset, relative to each other."""

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
        self.datasets = datasets
        self.shares = [weight / math.fsum(weights) for weight in weights]
        self.names = _names([dataset.location for dataset in datasets])
        self.order = MixtureOrder(
            [dataset.manifest for dataset in datasets],
            self.shares,
            seed=seed,
            global_batch=global_batch,
            window=shuffle_window,
        )
        self._seed = seed
        self._flip_probability = flip_probability
        self._announced: list[list[int]] = [[] for _ in datasets]

    @classmethod
    def open(cls, config: DataConfig, *, seed: int, global_batch: int, read_text: bool) -> Mixture:
        """The datasets of a recipe, all normalised in the same way.

        InputError if one is missing, unfinished or damaged, or if they do not belong together.
        """
        components = config.components
        manifests = [read_manifest(component.path) for component in components]
        weights = [component.weight for component in components]
        _check_belong_together([component.path for component in components], manifests)
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
            )
            for component, manifest in zip(components, manifests, strict=True)
        ]
        return cls(
            datasets,
            weights,
            seed=seed,
            global_batch=global_batch,
            shuffle_window=config.shuffle_window,
            flip_probability=config.flip_probability,
        )

    @property
    def normalization(self) -> Normalization:
        return self.datasets[0].normalization

    def read(self, positions: np.ndarray) -> Samples:
        """The samples at these global positions (b,) int64, all of one step. Errors as `LatentDataset.read`."""
        parts: list[tuple[np.ndarray, Samples]] = []
        for part in self.order.parts(positions):
            dataset = self.datasets[self.order.components[part.component].dataset]
            samples = dataset.read(
                part.records, positions[part.rows], seed=self._seed, flip_probability=self._flip_probability
            )
            parts.append((part.rows, samples))
        return parts[0][1] if len(parts) == 1 else _merge(len(positions), parts)

    def will_need(self, position: int) -> None:
        """Tell the datasets what training reads from here on. Returns at once. Called by one thread."""
        ahead = self.order.shards_ahead(position)
        for dataset, now, before in zip(self.datasets, ahead, self._announced, strict=True):
            if now != before:
                dataset.will_need(now)
        self._announced = ahead

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often each dataset, by name, was gone through when `num_samples` were seen."""
        return dict(zip(self.names, self.order.epochs(num_samples), strict=True))

    def close(self) -> None:
        for dataset in self.datasets:
            dataset.close()


def _merge(batch: int, parts: Sequence[tuple[np.ndarray, Samples]]) -> Samples:
    """One batch of the parts' rows, wherever they belong."""
    places = [torch.from_numpy(rows) for rows, _ in parts]

    def scattered(tensors: Sequence[Tensor]) -> Tensor:
        out = tensors[0].new_zeros((batch, *tensors[0].shape[1:]))
        for rows, tensor in zip(places, tensors, strict=True):
            out[rows] = tensor
        return out

    texts = [samples.text for _, samples in parts if samples.text is not None]
    lengths = [samples.text_lengths for _, samples in parts if samples.text_lengths is not None]
    longest = max((text.shape[1] for text in texts), default=0)
    padded = [torch.nn.functional.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts]
    return Samples(
        latents=scattered([samples.latents for _, samples in parts]),
        labels=scattered([samples.labels for _, samples in parts]),
        text=scattered(padded) if texts else None,
        text_lengths=scattered(lengths) if texts else None,
        bad={int(rows[row]): sample for rows, samples in parts for row, sample in samples.bad.items()},
    )


def _names(locations: Sequence[str]) -> list[str]:
    """Last parts of the locations; with a number in front where they do not tell the datasets apart."""
    names = [PurePosixPath(location).name for location in locations]
    return names if len(set(names)) == len(names) else [f"{i}-{name}" for i, name in enumerate(names)]


def _check_belong_together(locations: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """One network and one codec serve all datasets of a mixture."""
    first = manifests[0]
    for location, manifest in zip(locations[1:], manifests[1:], strict=True):
        both = f"data.mixture: {locations[0]} and {location}"
        if manifest.latent_codec.identity != first.latent_codec.identity:
            raise InputError(f"{both}: their codecs differ in weights. Encode one of them again with the other's")
        if manifest.class_names != first.class_names:
            raise InputError(f"{both}: their classes differ. Encode one of them again with the other's class names")
