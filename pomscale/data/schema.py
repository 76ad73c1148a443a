"""The shard contract: what a dataset folder declares about itself, and how its latents are normalised.

This module imports neither torch nor numpy, so that login nodes and planners can read a manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pomscale.config.schema import CodecConfig, ImageTransformConfig
from pomscale.errors import InputError

SCHEMA_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
FAILURES_NAME = "failures.jsonl"

# What to do when the dataset is damaged; finished shards are not encoded again while they have their name and size.
REMEDY = "delete the named shards and run the same `pomscale data encode` again"

# Members of a record are named KEY + one of these.
LATENT_MEMBER = ".latent.npy"
FLIP_MEMBER = ".latent_flip.npy"
CLASS_MEMBER = ".cls"
INFO_MEMBER = ".json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CodecInfo(_Part):
    """The codec that made the latents. `identity` is `Codec.identity()`."""

    config: CodecConfig
    identity: str
    scaling_factor: float
    shift: float


class LatentInfo(_Part):
    """What one stored latent is, and the statistics of the set.

    `shape` is that of one latent, (c, h, w); with `stores_moments` the array in the shard is (2c, h, w), mean and
    log-variance. `mean` and `std` (c values each) are those of unscaled latents; of posterior samples for moments.
    """

    shape: tuple[int, int, int]
    dtype: Literal["float16"]
    stores_moments: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.shape
        return (2 * channels if self.stores_moments else channels), height, width


class ShardInfo(_Part):
    name: str
    num_samples: int
    num_bytes: int
    sha256: str


class IndexInfo(_Part):
    num_bytes: int
    sha256: str


class Manifest(_Part):
    """Everything a reader must know of a dataset. Written last: a folder that has one is complete."""

    schema_version: Literal[1] = SCHEMA_VERSION
    pomscale_version: str
    modality: Literal["image"]
    codec: CodecInfo
    latent: LatentInfo
    transform: ImageTransformConfig
    class_names: tuple[str, ...]
    num_samples: int
    num_failures: int
    source_fingerprint: str
    shards: tuple[ShardInfo, ...]
    index: IndexInfo
    recipe: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        in_shards = sum(shard.num_samples for shard in self.shards)
        if self.num_samples != in_shards:
            raise ValueError(f"num_samples is {self.num_samples:,}, but the shards have {in_shards:,} samples")
        return self

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def has_flip(self) -> bool:
        return self.transform.flip

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the shard list: equal fingerprints, equal samples in the same order."""
        lines = (f"{shard.name} {shard.num_samples} {shard.sha256}\n" for shard in self.shards)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a dataset folder. InputError if the folder or the manifest is missing or of another version."""
    path = Path(folder) / MANIFEST_NAME
    if not path.parent.is_dir():
        raise InputError(f"dataset {folder}: there is no such folder; make it with `pomscale data encode RECIPE`")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"dataset {folder}: no {MANIFEST_NAME}; is the encode finished? "
            f"Run `pomscale data encode RECIPE` again, it goes on where it stopped"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise InputError(
            f"{path}: {where}: {problem['msg']}; this pomscale reads schema version {SCHEMA_VERSION}. "
            f"Encode the dataset again or use the version of pomscale that wrote it"
        ) from error


@dataclass(frozen=True)
class Normalization:
    """normalised = (latent - mean) / std, with one mean and one std per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, manifest: Manifest, rule: Literal["codec", "dataset"]) -> Normalization:
        """rule "codec": the codec's shift and scaling factor. rule "dataset": the measured mean and std."""
        latent, codec = manifest.latent, manifest.codec
        if rule == "codec":
            channels = latent.shape[0]
            return cls((codec.shift,) * channels, (1.0 / codec.scaling_factor,) * channels)
        if min(latent.std) <= 0.0:
            raise InputError(
                f"data.normalization: channel {latent.std.index(min(latent.std))} of the dataset is constant, "
                f"so it cannot be divided by its standard deviation; use normalization: codec"
            )
        return cls(latent.mean, latent.std)


def check_compatible(
    folder: str | Path,
    manifest: Manifest,
    codec_config: CodecConfig,
    latent_shape: Sequence[int],
    num_classes: int,
) -> None:
    """InputError, naming both values and the remedy, if the dataset does not fit the recipe's codec and model."""
    # The same weights may lie elsewhere on another machine, and the arithmetic of the encoder concerns nobody
    # who only reads latents.
    elsewhere = {"path", "precision"}
    stored, wanted = (config.model_dump(exclude=elsewhere) for config in (manifest.codec.config, codec_config))
    remedy = "Change the recipe, or encode the pictures again with `pomscale data encode`"
    if stored != wanted:
        raise InputError(f"dataset {folder}: made with codec {stored}, but the recipe's codec is {wanted}. {remedy}")
    if manifest.latent.shape != tuple(latent_shape):
        raise InputError(
            f"dataset {folder}: latents have shape {manifest.latent.shape} (channels, height, width), "
            f"but model.latent_shape is {tuple(latent_shape)}. {remedy}"
        )
    if manifest.num_classes != num_classes:
        raise InputError(
            f"dataset {folder}: has {manifest.num_classes} classes, but model.num_classes is {num_classes}. {remedy}"
        )
