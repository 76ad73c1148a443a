"""A dataset of shards as a set that is measured: what pictures and clips have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pomscale.data.dataset import LatentDataset
from pomscale.evaluation.generated.crops import crop_of
from pomscale.evaluation.generated.picture_sets import Kind, checked_count, spread
from pomscale.shards.location import local_folder
from pomscale.shards.schema import Manifest, Normalization


class ShardSet:
    """Latents of a dataset, of which records are taken at equal distances."""

    def __init__(self, location: str, manifest: Manifest, num: int | None, kind: Kind) -> None:
        """Open the latents.

        Args:
            location: Folder or URL.
            manifest: Its manifest.
            num: Number of records that are measured; None = all.
            kind: "pictures" or "clips", for messages.

        Raises:
            InputError: There are fewer than `num`.
        """
        self.name, self.manifest = location, manifest
        self._dataset = LatentDataset(
            location,
            manifest,
            Normalization.of(manifest, "codec"),
            reading="mapped" if local_folder(location) is not None else "streamed",
            bad_samples="skip",
        )
        self.num_pictures = checked_count(location, num, len(self._dataset), kind)

    @property
    def crop(self) -> dict[str, Any] | None:
        return crop_of(self.manifest.transform)

    def identity(self) -> dict[str, Any]:
        return self.settings()

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "shards",
            "path": self.name,
            "count": self.num_pictures,
            "of": len(self._dataset),
            "sha256": self.manifest.fingerprint,
            "codec": self.manifest.latent_codec.identity,
            "crop": self.crop,
        }

    def _records(self, numbers: Sequence[int]) -> np.ndarray:
        """Return the records (n,) of pictures or clips."""
        return np.array([spread(number, self.num_pictures, len(self._dataset)) for number in numbers])
