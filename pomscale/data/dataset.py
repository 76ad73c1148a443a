"""Random access to one dataset: latents as they are stored, labels, text embeddings and features of any records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.config.data import CacheConfig
from pomscale.data.bad_samples import BadSample
from pomscale.data.draws import uniforms_at
from pomscale.data.readers.arrays import ArrayReader, Faults, Members
from pomscale.data.readers.companion import CompanionReader
from pomscale.data.readers.features import FeaturesReader
from pomscale.data.readers.texts import TextReader
from pomscale.data.remote.fetch import remedy
from pomscale.data.remote.shard_cache import local_index
from pomscale.shards.index import NO_LABEL
from pomscale.shards.schema import Manifest, Normalization, read_manifest


@dataclass(frozen=True, slots=True)
class Samples:
    """Records of one shape. Rows of bad samples hold zeros, class 0 if there are classes, and the null embedding."""

    # (b, c, ...) not normalised; float16 with gaps between rows, float32 where drawn from moments, or uint8 pixels
    latents: Tensor
    labels: Tensor  # (b,) int64, NO_LABEL where the dataset has no classes
    text: Tensor | None  # (b, n, dim) float16, zero after each row's length
    text_lengths: Tensor | None  # (b,) int64
    bad: dict[int, BadSample]  # by row
    features: Tensor | None = None  # (b, n, dim) float16, a teacher's, of the flipped picture where it is flipped


class LatentDataset:
    """Random access to the records of a dataset, in a folder or behind a URL. Safe to share between threads."""

    def __init__(
        self,
        location: str | Path,
        manifest: Manifest,
        normalization: Normalization,
        *,
        text: str | None = None,
        reading: Literal["mapped", "streamed"] = "mapped",
        cache: CacheConfig | None = None,
        bad_samples: Literal["raise", "skip"] = "raise",
        pin_memory: bool = False,
    ) -> None:
        """Open a dataset.

        Args:
            location: Folder or URL.
            manifest: Its manifest.
            normalization: How its latents are to be normalised.
            text: Location of the set that has the text embeddings, perhaps this very dataset; None = do not read them.
            reading: Whether shards are memory-mapped, or streamed into memory.
            cache: Cache of the node for shards behind a URL.
            bad_samples: "raise" the error of the first record that cannot be read, or "skip" and list such records.
            pin_memory: Whether pixels are read into pinned memory, from which a GPU copies them.
        """
        self.location = str(location)
        self.manifest = manifest
        self.normalization = normalization
        self._bad_samples = bad_samples
        self._reading = reading
        self._cache = cache
        self._reader = ArrayReader(self.location, manifest, reading, cache, pin_memory=pin_memory)
        self.text: TextReader | None = None
        self.features: FeaturesReader | None = None
        self._companions: list[CompanionReader] = []
        """Readers of other sets."""
        if text is not None:
            is_own = text == self.location
            self.text = TextReader(self._reader, self._reader if is_own else self._open(text))
            self._companions += [] if is_own else [self.text]
        self._ends = np.cumsum([shard.num_samples for shard in manifest.shards])

    def read_features(self, location: str, *, flips: bool, until: int | None = None) -> None:
        """Read also the features of a teacher, from now on; call it before any other thread reads.

        Args:
            location: Companion set that has them.
            flips: Whether records will be mirrored, where this dataset has flips.
            until: Global position from which on nothing is read, and features are zeros; None = none.

        Raises:
            InputError: The set has no features, or those of other pictures than this dataset's, or cannot be joined.
        """
        self.features = FeaturesReader(self._reader, self._open(location), flips=flips, until=until)
        self._companions.append(self.features)

    def _open(self, location: str) -> ArrayReader:
        return ArrayReader(location, read_manifest(location), self._reading, self._cache)

    @classmethod
    def open(cls, location: str | Path, normalization: Literal["codec", "dataset"]) -> LatentDataset:
        """Open a dataset without text. Raises InputError if it is missing, unfinished or its index does not fit."""
        manifest = read_manifest(location)
        return cls(location, manifest, Normalization.of(manifest, normalization))

    def __len__(self) -> int:
        return self.manifest.num_samples

    def read(self, records: np.ndarray, positions: np.ndarray, *, seed: int, flip_probability: float) -> Samples:
        """Return the samples of some records.

        The choices between original and flip and between captions, and the posterior draw where moments are stored, are
        keyed by (seed, position). Raises InputError, naming file, record and remedy, where `bad_samples` is "raise" and
        a record cannot be read.

        Args:
            records: Record numbers (b,) int64, all of one group.
            positions: Their global positions (b,) int64.
            seed: Seed of the run.
            flip_probability: Share of flipped samples; no effect on a dataset without them.
        """
        faults: Faults = {}
        rows = self._reader.index.take(records)
        self._reader.check_rows(records, rows, faults)
        members = Members.of(records, rows, "latent")
        info, shape = self.manifest.latents, self._stored_shape(records)
        flips = np.zeros(len(records), bool)
        if info.has_flip:
            flips = uniforms_at(positions, seed, Stream.FLIP) < flip_probability
        if info.stores_flip:
            members = Members.of_one(records, rows, ("latent", "flip"), flips)
        if info.dtype == "uint8":
            latents = self._reader.pictures(members, shape, flips, faults)
        else:
            latents = self._reader.same_shape(members, shape, faults)
        if info.stores_moments:
            latents = _sample_posterior(latents, positions, seed)
        labels = torch.from_numpy(rows["label"].astype(np.int64))
        features = None if self.features is None else self.features.read(members, positions, flips, faults)
        # Last, since the rows with faults get the embedding of the empty caption there.
        text, text_lengths = (None, None) if self.text is None else self.text.read(members, positions, seed, faults)
        if faults:
            bad = sorted(faults)
            if self._bad_samples == "raise":
                raise faults[bad[0]].error()
            latents[bad] = 0
            if features is not None:
                features[bad] = 0
            labels[bad] = 0 if self.manifest.num_classes else NO_LABEL
        return Samples(latents, labels, text, text_lengths, faults, features)

    @property
    def reads_ahead(self) -> bool:
        """Whether `will_need` has an effect."""
        return any(reader.files.reads_ahead for reader in self._readers())

    def will_need(self, shards: Sequence[int], position: int) -> None:
        """Announce the shards of the records that are read next, soonest first; this replaces the last announcement.

        position: global position of the first of them.
        """
        self._reader.files.will_need(shards)
        for companion in self._companions:
            theirs = [] if companion.is_over(position) else self._shards_of(companion, shards)
            companion.source.files.will_need(theirs)

    def num_bytes(self, shards: Sequence[int]) -> int:
        """Return the size of these shards, and of those of the companion sets that have the same records."""
        needed = [self.manifest.shards[shard] for shard in shards]
        for companion in self._companions:
            theirs = companion.source.manifest.shards
            needed += [theirs[shard] for shard in self._shards_of(companion, shards)]
        return sum(shard.num_bytes for shard in needed)

    def check_indexes(self) -> None:
        """Hash the index, and those of the companion sets. Raises InputError if one is not what its manifest says.

        No other check would notice a wrong label, since the checksums of the records are in the index too.
        """
        for reader in self._readers():
            path = local_index(reader.location, reader.manifest, self._cache)
            try:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error}. {remedy(reader.location)}") from error
            if found != reader.manifest.index.sha256:
                raise InputError(f"{path}: its checksum is not that of the manifest. {remedy(reader.location)}")

    def close(self) -> None:
        """Stop reading ahead in the background."""
        for reader in self._readers():
            reader.files.close()

    def _readers(self) -> list[ArrayReader]:
        return [self._reader, *(companion.source for companion in self._companions)]

    def _shards_of(self, companion: CompanionReader, shards: Sequence[int]) -> list[int]:
        """Return the shards of a companion set that have all records in these shards."""
        ranges = [np.arange(self._ends[s] - self.manifest.shards[s].num_samples, self._ends[s]) for s in shards]
        return list(dict.fromkeys(shard for records in ranges for shard in companion.shards(records).tolist()))

    def _stored_shape(self, records: np.ndarray) -> tuple[int, ...]:
        # By the record's number: the shard in its row may be damaged.
        first, last = np.searchsorted(self._ends, [records.min(), records.max()], side="right").tolist()
        group = self.manifest.shards[first].group
        assert group == self.manifest.shards[last].group, "one batch, one shape"
        return self.manifest.stored_shape(group)


def _sample_posterior(moments: Tensor, positions: np.ndarray, seed: int) -> Tensor:
    """Return mean + std * noise, (b, c, ...), of moments (b, 2c, ...), mean and log-variance."""
    mean, logvar = moments.float().chunk(2, dim=1)
    noise = np.empty(mean.shape, np.float32)
    for row, position in zip(noise, positions.tolist(), strict=True):
        keyed_generator(seed, Stream.POSTERIOR, position).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(noise).mul_(logvar.mul(0.5).exp_()).add_(mean)
