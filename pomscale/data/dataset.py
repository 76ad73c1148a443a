"""Reads normalised latents out of memory-mapped shards."""

from __future__ import annotations

import functools
import mmap
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from pomscale.data.index import map_index, npy_header
from pomscale.data.schema import INDEX_NAME, REMEDY, Manifest, Normalization, read_manifest
from pomscale.errors import InputError
from pomscale.keyed_random import Stream, keyed_generator

# Every mapped shard holds a file descriptor; the usual limit of a process is 1,024 of them, and training opens two
# datasets.
_MAX_OPEN_SHARDS = 256

_TAR_BLOCK = 512
_PLACE_FIELDS = ("offset", "length", "crc32")


class LatentDataset:
    """Random access to the records of a dataset folder. Safe to share between threads."""

    def __init__(self, folder: str | Path, manifest: Manifest, normalization: Normalization) -> None:
        self.folder = Path(folder)
        self.manifest = manifest
        self.normalization = normalization
        self._mean = np.asarray(normalization.mean, np.float32)[:, None, None]
        self._std = np.asarray(normalization.std, np.float32)[:, None, None]
        self._header = npy_header(manifest.latent.stored_shape, "<f2")
        self._index = self._open_index()
        self._shard = functools.lru_cache(maxsize=_MAX_OPEN_SHARDS)(self._map_shard)

    @classmethod
    def open(cls, folder: str | Path, normalization: Literal["codec", "dataset"]) -> LatentDataset:
        """Opens a finished dataset. InputError if it is missing, unfinished or its index does not fit."""
        manifest = read_manifest(folder)
        return cls(folder, manifest, Normalization.of(manifest, normalization))

    def __len__(self) -> int:
        return self.manifest.num_samples

    def read(
        self, records: np.ndarray, positions: np.ndarray, *, seed: int, flip_probability: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Normalised latents (b, c, h, w) float32 and labels (b,) int64 of records (b,) int64.

        Which of original and flip is read, and the posterior draw where moments are stored, are keyed by
        (seed, position). flip_probability has no effect on a dataset without flipped copies.
        InputError, naming file, record and remedy, where a shard is missing, cut off or damaged, or the index is wrong.
        """
        rows = self._index[records]
        self._check_rows(records, rows)
        flips = self._flips(positions, seed, flip_probability)
        places = [np.where(flips, rows[f"flip_{field}"], rows[f"latent_{field}"]) for field in _PLACE_FIELDS]
        stored = np.empty((len(records), *self.manifest.latent.stored_shape), np.float32)
        members = zip(stored, records.tolist(), rows["shard"].tolist(), *(p.tolist() for p in places), strict=True)
        for out, record, shard, offset, length, crc32 in members:
            self._read_member(out, record, shard, offset, length, crc32)
        latents = self._sample_posterior(stored, positions, seed) if self.manifest.latent.stores_moments else stored
        latents -= self._mean
        latents /= self._std
        return latents, rows["label"].astype(np.int64)

    def _check_rows(self, records: np.ndarray, rows: np.ndarray) -> None:
        wrong = np.zeros(len(rows), bool)
        for field, count in (("shard", len(self.manifest.shards)), ("label", self.manifest.num_classes)):
            wrong |= (rows[field] < 0) | (rows[field] >= count)
        if wrong.any():
            row = rows[wrong][0]
            raise InputError(
                f"{self.folder / INDEX_NAME}: record {records[wrong][0]}: there is no shard {row['shard']} or no class "
                f"{row['label']}. {self._remedy()}"
            )

    def _flips(self, positions: np.ndarray, seed: int, probability: float) -> np.ndarray:
        if not self.manifest.has_flip:
            return np.zeros(len(positions), bool)
        draws = [keyed_generator(seed, Stream.FLIP, position).random() for position in positions.tolist()]
        return np.array(draws) < probability

    def _sample_posterior(self, moments: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
        mean, logvar = np.split(moments, 2, axis=1)
        noise = np.stack(
            [
                keyed_generator(seed, Stream.POSTERIOR, position).standard_normal(mean.shape[1:], np.float32)
                for position in positions.tolist()
            ]
        )
        noise *= np.exp(0.5 * logvar)
        noise += mean
        return noise

    def _read_member(self, out: np.ndarray, record: int, shard: int, offset: int, length: int, crc32: int) -> None:
        payload = self._shard(shard)[offset : offset + length]
        header, data = payload[: len(self._header)], payload[len(self._header) :]
        if header.tobytes() != self._header or data.nbytes != 2 * out.size:
            raise self._damaged(record, shard, offset, f"it is not a float16 array of shape {out.shape}")
        if zlib.crc32(payload.data) != crc32:
            raise self._damaged(record, shard, offset, "its checksum is wrong")
        # The only copy of the samples: page cache to batch, widened to float32 on the way.
        out[:] = data.view("<f2").reshape(out.shape)
        if not np.isfinite(out).all():
            raise self._damaged(record, shard, offset, "it holds a value that is not finite")

    def _map_shard(self, number: int) -> np.ndarray:
        info = self.manifest.shards[number]
        path = self.folder / info.name
        try:
            with path.open("rb") as file:
                shard = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {error}. {self._remedy()}") from error
        if len(shard) != info.num_bytes:
            raise InputError(
                f"{path}: has {len(shard):,} bytes, but the manifest says {info.num_bytes:,}. {self._remedy()}"
            )
        return shard

    def _open_index(self) -> np.ndarray:
        path = self.folder / INDEX_NAME
        try:
            num_bytes = path.stat().st_size
            if num_bytes != self.manifest.index.num_bytes:
                raise ValueError(f"has {num_bytes:,} bytes, but the manifest says {self.manifest.index.num_bytes:,}")
            return map_index(path, self.manifest.num_samples)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {error}. {self._remedy()}") from error

    def _damaged(self, record: int, shard: int, offset: int, what: str) -> InputError:
        header = self._shard(shard)[offset - _TAR_BLOCK : offset].tobytes()
        # ustar: the name in bytes 0-99, the folders that do not fit in there in bytes 345-499.
        parts = (part.rstrip(b"\0").decode(errors="replace") for part in (header[345:500], header[:100]))
        name = "/".join(part for part in parts if part)
        path = self.folder / self.manifest.shards[shard].name
        return InputError(f"{path}: record {record}, {name}: {what}. {self._remedy()}")

    def _remedy(self) -> str:
        return f"Run `pomscale data verify {self.folder}` for the whole list, then {REMEDY}"
