"""The manifest of a dataset, its checks against a recipe, and the normalisation of its latents.

This module imports neither torch nor numpy, so that login nodes and planners can read a manifest.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pomscale.base.errors import InputError
from pomscale.config.codecs import CodecConfig
from pomscale.config.encode import TransformConfig, VideoTransformConfig
from pomscale.config.identity import settings_of_latents
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.text import MAX_ENCODERS, TextEncoderConfig
from pomscale.shards.location import join, local_folder, read_bytes

SCHEMA_VERSION: Literal[2] = 2
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
FAILURES_NAME = "failures.jsonl"

# Remedy for a damaged dataset.
REMEDY = "run `pomscale data repair` on it"
# Remedy for a dataset that does not fit the recipe.
_CHANGE_OR_ENCODE = "Change the recipe, or encode the dataset again with `pomscale data encode`"

# Captions of one item, at most.
MAX_CAPTIONS = 100

# Arrays that a record may have: name in the index, and suffix of the member in the tar (`Manifest.array_members` has
# those of a dataset). A record has a text array for each of its captions: "text" for the first, "text_1" for the
# second; and the same of each further encoder: "text2", "text2_1".
ArrayName = str


def text_arrays(encoder: int) -> tuple[ArrayName, ...]:
    """Return the names of the text arrays of an encoder, counted from 0, by caption."""
    first = f"text{encoder + 1}" if encoder else "text"
    return (first, *(f"{first}_{number}" for number in range(1, MAX_CAPTIONS)))


TEXT_ARRAYS = text_arrays(0)
# A teacher's features of a record, and of the mirrored one.
FEATURE_ARRAYS: tuple[ArrayName, ...] = ("features", "features_flip")
ARRAY_MEMBERS: dict[ArrayName, str] = {
    "latent": ".latent.npy",
    "flip": ".latent_flip.npy",
    "features": ".features.npy",
    "features_flip": ".feat_flip.npy",  # no longer than others: the rest of a tar's 100 bytes is for the key
    **{name: f".{name}.npy" for encoder in range(MAX_ENCODERS) for name in text_arrays(encoder)},
}
PNG_MEMBER = ".png"
CLASS_MEMBER = ".cls"
CAPTION_MEMBER = ".txt"
INFO_MEMBER = ".json"
# Field of INFO_MEMBER that lists all captions of a record with several.
CAPTIONS_FIELD = "captions"


def array_members(arrays: Sequence[ArrayName], coding: Literal["raw", "png"]) -> dict[ArrayName, str]:
    """Return the suffixes of the members that hold arrays, in their order."""
    return {array: PNG_MEMBER if (array, coding) == ("latent", "png") else ARRAY_MEMBERS[array] for array in arrays}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def equals(default: object) -> Callable[[Any], bool]:
    """Return the `exclude_if` of a field that manifests and records have gained, and that says nothing at its default.

    Left out then, it neither changes their bytes nor keeps an older version from reading the dataset.
    """
    return default.__eq__


def is_none(value: object) -> bool:
    """`exclude_if` as `equals` makes them, of a field that is None by default."""
    return value is None


_Factor = Annotated[float, Field(gt=0)]


class CodecInfo(_Part):
    """The codec that made the latents. `identity` is `Codec.identity()`.

    Networks are trained on (latent - shift) * scaling_factor, with one number for all channels or one for each.
    """

    config: CodecConfig
    identity: str
    scaling_factor: _Factor | tuple[_Factor, ...]
    shift: float | tuple[float, ...]


class LatentInfo(_Part):
    """Format of the stored latents, and their statistics.

    With `stores_moments` an array in a shard is (2c, ...), mean and log-variance. `mean` and `std` (c values each) are
    those of unscaled latents, over `num_values` values per channel; for moments those of posterior samples. float16 is
    used and not bfloat16, since it has three more bits of mantissa, latents are small numbers (those that do not fit
    are refused), and .npy has it. Pixels are uint8, as arrays (raw) or PNG files.
    """

    dtype: Literal["float16", "uint8"] = "float16"
    coding: Literal["raw", "png"] = Field("raw", exclude_if=equals("raw"))
    stores_moments: bool
    has_flip: bool
    num_values: int = Field(ge=0)
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> LatentInfo:
        if self.dtype == "float16" and self.coding != "raw":
            raise ValueError(f"coding {self.coding} is for uint8")
        if self.dtype == "uint8" and self.stores_moments:
            raise ValueError("moments are not stored as uint8")
        return self

    @property
    def num_channels(self) -> int:
        return len(self.mean)

    @property
    def stores_flip(self) -> bool:
        """Whether flipped copies are stored. Pixels are flipped as they are read, where `has_flip` allows it."""
        return self.has_flip and self.dtype != "uint8"


class TextInfo(_Part):
    """The text encoder, and its embedding of an empty caption: (null_length, dim) float16, base64.

    Records have up to `num_captions` embeddings, of which a reader takes one for each sample.

    Further encoders stand `beside` the first. A network sees their embeddings of a caption one behind the other, the
    narrower ones padded with zeros on channels, as Stable Diffusion 3 does: at most `max_length` tokens of `width`.
    """

    config: TextEncoderConfig
    identity: str
    dim: int = Field(gt=0)
    dtype: Literal["float16"] = "float16"
    null_length: int = Field(gt=0)
    null_embedding: str
    num_captions: int = Field(1, gt=0, le=MAX_CAPTIONS, exclude_if=equals(1))
    beside: tuple[TextInfo, ...] = Field((), max_length=MAX_ENCODERS - 1, exclude_if=equals(()))

    @model_validator(mode="after")
    def _check(self) -> TextInfo:
        if len(self.null_bytes) != 2 * self.null_length * self.dim:
            raise ValueError(f"null_embedding is no float16 array of shape ({self.null_length}, {self.dim})")
        if any(other.beside or other.num_captions != self.num_captions for other in self.beside):
            raise ValueError("encoders beside the first have its num_captions, and none beside themselves")
        return self

    @classmethod
    def of(cls, encoders: Sequence[TextInfo]) -> TextInfo:
        """Return the encoders as one, the first with the others beside it."""
        return encoders[0].model_copy(update={"beside": tuple(encoders[1:])})

    @property
    def encoders(self) -> tuple[TextInfo, ...]:
        """All encoders, in the order in which a network sees their embeddings."""
        return (self, *self.beside)

    @property
    def max_length(self) -> int:
        """Longest embeddings of a caption, in tokens of all encoders."""
        return sum(encoder.config.stored_length for encoder in self.encoders)

    @property
    def width(self) -> int:
        """Values per token: those of the widest encoder."""
        return max(encoder.dim for encoder in self.encoders)

    @property
    def joint_identity(self) -> str:
        """Identity of all encoders together: `identity` where there is one."""
        return joint_identity([encoder.identity for encoder in self.encoders])

    @property
    def null_bytes(self) -> bytes:
        """Embedding of the empty caption, little-endian float16, row by row."""
        return base64.b64decode(self.null_embedding)


def joint_identity(identities: Sequence[str]) -> str:
    """Return one identity (hex) for those of several text encoders, in their order."""
    if len(identities) == 1:
        return identities[0]
    return hashlib.sha256("\n".join(identities).encode()).hexdigest()


class FeaturesInfo(_Part):
    """The teacher, and its features of each record: (n, dim) float16, n the product of the grid.

    Tokens are in the order frame groups, rows, columns. `teacher` is its spec without the path, e.g. "dinov2";
    `identity` is the sha256 of network, weights and preprocessing: sets of equal identity and grid belong together.
    """

    teacher: str
    identity: str
    dim: int = Field(gt=0)
    grid: tuple[int, int] | tuple[int, int, int]
    """(rows, columns) of pictures, (frame groups, rows, columns) of clips."""
    dtype: Literal["float16"] = "float16"
    has_flip: bool
    """Whether the features of the mirrored pictures are stored, too."""

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (n, dim) of a record's features."""
        return self.num_tokens, self.dim


class GroupInfo(_Part):
    """Shards whose latents have one shape, (c, h, w) or (c, f, h, w); () in a set without latents.

    `target` is the size of the codec's input: (height, width) or (frames, height, width) in pixels.
    """

    shape: tuple[int, ...]
    target: tuple[int, ...]


class ShardInfo(_Part):
    """A shard as the manifest lists it."""

    # A plain file name: a manifest may come from elsewhere, and says what is written into a cache.
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")
    num_samples: int = Field(gt=0)
    num_bytes: int = Field(gt=0)
    sha256: str
    group: int = 0


class IndexInfo(_Part):
    """Size and checksum of the index."""

    num_bytes: int = Field(ge=0)
    sha256: str


class SourceInfo(_Part):
    """The source of the items. `num_items` is the number that it lists: samples and failures together.

    `num_filtered` more were left out by the recipe's `source.where`.
    """

    fingerprint: str
    num_items: int = Field(ge=0)
    num_filtered: int = Field(0, ge=0, exclude_if=equals(0))


class Manifest(_Part):
    """Everything a reader must know of a dataset. Written last: a folder that has one is complete.

    Shards are sorted by group, so the records of a group are neighbours in the index. `keys_sha256` is that of the
    index's key column (8 bytes each, little-endian, in order): two sets with the same one have the same records in the
    same order. `num_incomplete` clips end early and were kept (transform.incomplete: keep), as their JSON says.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    pomscale_version: str
    codec: CodecInfo | None
    latent: LatentInfo | None
    transform: TransformConfig | None
    transform_version: int = Field(1, exclude_if=equals(1))  # what it was before manifests had it
    text: TextInfo | None
    text_version: int = Field(1, exclude_if=equals(1))  # what it was before manifests had it, and without embeddings
    features: FeaturesInfo | None = Field(None, exclude_if=is_none)
    has_captions: bool
    class_names: tuple[str, ...]
    num_samples: int = Field(ge=0)
    num_failures: int = Field(ge=0)
    num_incomplete: int = Field(0, ge=0, exclude_if=equals(0))
    source: SourceInfo
    groups: tuple[GroupInfo, ...]
    shards: tuple[ShardInfo, ...]
    keys_sha256: str
    index: IndexInfo
    recipe: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        in_shards = sum(shard.num_samples for shard in self.shards)
        if self.num_samples != in_shards:
            raise ValueError(f"num_samples is {self.num_samples:,}, but the shards have {in_shards:,} samples")
        if (self.codec is None) != (self.latent is None):
            raise ValueError("codec and latent belong together")
        if (self.transform is None) != (self.latent is None and self.features is None):
            raise ValueError("a transform belongs to latents or features, and only to these")
        groups = [shard.group for shard in self.shards]
        if groups != sorted(groups) or any(not 0 <= group < len(self.groups) for group in groups):
            raise ValueError("the shards are not sorted by group, or name a group that is not there")
        return self

    @property
    def arrays(self) -> tuple[ArrayName, ...]:
        """The arrays of the records in the order of the index's columns.

        Every record has all of them, but for the texts of captions after its last.
        """
        present: list[ArrayName] = []
        if self.latent is not None:
            present += ["latent", "flip"] if self.latent.stores_flip else ["latent"]
        if self.features is not None:
            present += FEATURE_ARRAYS[: 1 + self.features.has_flip]
        return (*present, *self.text_arrays)

    @property
    def array_members(self) -> dict[ArrayName, str]:
        """Suffixes of the members that hold `arrays`, in their order."""
        return array_members(self.arrays, "raw" if self.latent is None else self.latent.coding)

    @property
    def text_arrays(self) -> tuple[ArrayName, ...]:
        """The text arrays among `arrays`, encoder by encoder."""
        return tuple(array for of_encoder in self.arrays_by_encoder for array in of_encoder)

    @property
    def arrays_by_encoder(self) -> tuple[tuple[ArrayName, ...], ...]:
        """The text arrays of each encoder, by caption."""
        if self.text is None:
            return ()
        return tuple(text_arrays(i)[: self.text.num_captions] for i in range(len(self.text.encoders)))

    def encoder_of(self, array: ArrayName) -> TextInfo:
        """Return the encoder of a text array."""
        assert self.text is not None
        number = next(i for i, arrays in enumerate(self.arrays_by_encoder) if array in arrays)
        return self.text.encoders[number]

    @property
    def modality(self) -> Literal["image", "video", "text"]:
        return "text" if self.transform is None else self.transform.kind

    @property
    def fps(self) -> float | None:
        """Frames per second of the clips; None if there are none."""
        return self.transform.fps if isinstance(self.transform, VideoTransformConfig) else None

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if records have no class."""
        return len(self.class_names)

    @property
    def latents(self) -> LatentInfo:
        """`latent`, for readers that need latents."""
        if self.latent is None:
            raise InputError(f"this is a set of {self.contents} without latents; name the dataset that has the latents")
        return self.latent

    @property
    def latent_codec(self) -> CodecInfo:
        """`codec`, for readers that need latents."""
        if self.codec is None:
            raise InputError(f"this is a set of {self.contents} without latents; name the dataset that has the latents")
        return self.codec

    @property
    def contents(self) -> Literal["latents", "features", "text embeddings"]:
        """What the records of the set are, first of all."""
        if self.latent is not None:
            return "latents"
        return "text embeddings" if self.features is None else "features"

    @property
    def is_derived(self) -> bool:
        """Whether the set was made from other datasets (merge, split), and not by an encode."""
        return self.recipe.get("kind") in ("merge", "split")

    @property
    def max_skipped(self) -> int:
        """Number of skipped items that the recipe of the dataset allows.

        A set that was made from others skipped nothing itself: its failures are those of the others, and their recipes
        allowed them.
        """
        if self.is_derived:
            return self.num_failures
        return int(self.recipe.get("max_skipped", 0))  # sets of older releases have no such key

    def stored_shape(self, group: int) -> tuple[int, ...]:
        """Return the shape of a latent array in the shards of a group: twice the channels with moments."""
        channels, *size = self.groups[group].shape
        return (2 * channels if self.latents.stores_moments else channels), *size

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) of the shard list: equal fingerprints mean equal samples in the same order."""
        lines = (f"{shard.name} {shard.num_samples} {shard.sha256}\n" for shard in self.shards)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_manifest(location: str | Path) -> Manifest:
    """Read the manifest of a dataset, a folder or any URL that fsspec knows (as a str).

    Raises InputError if folder or manifest is missing or of another version, PomscaleError if the network fails.
    """
    path = join(location, MANIFEST_NAME)
    folder = local_folder(location)
    if folder is not None and not folder.is_dir():
        raise InputError(f"dataset {location}: there is no such folder; make it with `pomscale data encode RECIPE`")
    try:
        content = read_bytes(location, MANIFEST_NAME)
    except FileNotFoundError:
        raise InputError(
            f"dataset {location}: no {MANIFEST_NAME}; is the encode finished? "
            f"Run `pomscale data encode RECIPE` again, it continues where it stopped"
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
        """Return the normalisation of a dataset.

        Rule "codec" uses the codec's shift and scaling factor, rule "dataset" the measured mean and std.
        """
        return cls.of_mixture([manifest], [1.0], rule)

    @classmethod
    def by_codec(
        cls, shift: float | tuple[float, ...], scaling_factor: float | tuple[float, ...], num_channels: int
    ) -> Normalization:
        """Return (latent - shift) * scaling_factor, of one number for all channels or one for each."""
        shifts, factors = (
            value if isinstance(value, tuple) else (value,) * num_channels for value in (shift, scaling_factor)
        )
        if not len(shifts) == len(factors) == num_channels:
            raise InputError(
                f"the codec has constants of {len(shifts)} and {len(factors)} channels, and its latents have "
                f"{num_channels}; encode the dataset again"
            )
        return cls(shifts, tuple(1.0 / factor for factor in factors))

    @classmethod
    def of_mixture(
        cls, manifests: Sequence[Manifest], weights: Sequence[float], rule: Literal["codec", "dataset"]
    ) -> Normalization:
        """Return one normalisation for several datasets, by the rules of `of`.

        Rule "dataset" uses mean and std of samples drawn with the weights (law of total variance). Raises InputError if
        the codecs disagree, or a channel is constant.
        """
        if rule == "codec":
            scalings = {(m.latent_codec.shift, m.latent_codec.scaling_factor) for m in manifests}
            if len(scalings) > 1:
                raise InputError(
                    f"data.mixture: the codecs of the datasets scale latents differently (shift, factor: "
                    f"{sorted(scalings, key=str)}); encode them with one codec, or use normalization: dataset"
                )
            ((shift, factor),) = scalings
            return cls.by_codec(shift, factor, manifests[0].latents.num_channels)
        total = math.fsum(weights)
        shares = [weight / total for weight in weights]
        channels_of = [list(zip(m.latents.mean, m.latents.std, strict=True)) for m in manifests]
        pooled = [_pool(shares, channel) for channel in zip(*channels_of, strict=True)]
        mean, std = (tuple(values) for values in zip(*pooled, strict=True))
        if min(std) <= 0.0:
            raise InputError(
                f"data.normalization: channel {std.index(min(std))} of the dataset is constant, "
                f"so it cannot be divided by its standard deviation; use normalization: codec"
            )
        return cls(mean, std)


def _pool(shares: Sequence[float], moments: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return mean and standard deviation of a mixture, given those of its parts."""
    if len(moments) == 1:
        return moments[0]  # to the last digit
    mean = math.fsum(share * m for share, (m, _) in zip(shares, moments, strict=True))
    variance = math.fsum(share * (s * s + (m - mean) ** 2) for share, (m, s) in zip(shares, moments, strict=True))
    return mean, math.sqrt(variance)


def check_has_latents(location: str | Path, manifest: Manifest) -> None:
    """Raise InputError for a companion set: text embeddings or features alone."""
    if manifest.latent is None:
        raise InputError(
            f"dataset {location}: has {manifest.contents} and no latents; name the dataset that has the latents"
        )


def check_compatible(
    folder: str | Path, manifest: Manifest, codec_config: CodecConfig, model: ImageModelConfig | VideoModelConfig
) -> None:
    """Raise InputError, naming both values and the remedy, if the dataset does not fit the recipe's codec and model.

    `check_text` checks the texts, which may lie in another set.
    """
    check_has_latents(folder, manifest)
    made_with = manifest.latent_codec.config
    stored, wanted = settings_of_latents(made_with.model_dump(), codec_config.model_dump())
    if stored != wanted:
        raise InputError(
            f"dataset {folder}: made with codec {stored}, but the recipe's codec is {wanted}. {_CHANGE_OR_ENCODE}"
        )
    for number in sorted({shard.group for shard in manifest.shards}):
        shape = manifest.groups[number].shape
        problem = _misfit(shape, model)
        if problem is not None:
            raise InputError(
                f"dataset {folder}: has latents of shape {shape} (channels, [frames,] height, width), but {problem}. "
                f"{_CHANGE_OR_ENCODE}"
            )
    num_classes = model.num_classes if isinstance(model, ImageModelConfig) else None
    if num_classes is not None and manifest.num_classes != num_classes:
        raise InputError(
            f"dataset {folder}: has {manifest.num_classes} classes, but model.num_classes is {num_classes}. "
            f"{_CHANGE_OR_ENCODE}"
        )


def _misfit(shape: tuple[int, ...], model: ImageModelConfig | VideoModelConfig) -> str | None:
    """Return why a shape (c, f, h, w) or (c, h, w) does not fit a model, or None.

    Clips, and pictures of a text, may be smaller than the model's largest, and models of clips take pictures too.
    """
    if isinstance(model, VideoModelConfig):
        return _misfit_of_texts(shape, model, model.patch_frames)
    if model.text_dim is None or len(shape) != 3:
        return None if shape == model.latent_shape else f"model.latent_shape is {model.latent_shape}"
    return _misfit_of_texts(shape, model, patch_frames=1)


def _misfit_of_texts(
    shape: tuple[int, ...], model: ImageModelConfig | VideoModelConfig, patch_frames: int
) -> str | None:
    channels, num_frames, height, width = shape if len(shape) == 4 else (shape[0], 1, *shape[1:])
    if channels != model.latent_shape[0]:
        return f"model.latent_shape says {model.latent_shape[0]} channels"
    if num_frames != 1 and num_frames % patch_frames:
        return f"{num_frames} frames are not divisible by model.patch_frames {patch_frames}"
    if height % model.patch_size or width % model.patch_size:
        return f"{height}x{width} is not divisible by model.patch_size {model.patch_size}"
    num_tokens = -(-num_frames // patch_frames) * (height // model.patch_size) * (width // model.patch_size)
    if num_tokens > model.num_tokens:
        return (
            f"that is {num_tokens:,} tokens, and model.latent_shape {model.latent_shape} of the largest "
            f"{'clips' if isinstance(model, VideoModelConfig) else 'pictures'} says {model.num_tokens:,}"
        )
    return None


def check_text(location: str | Path, manifest: Manifest, model: ImageModelConfig | VideoModelConfig) -> None:
    """Raise InputError, naming both values and the remedy, if the set of the texts does not fit the model."""
    dim = text_info(location, manifest).width
    if dim != model.text_dim:
        raise InputError(
            f"dataset {location}: its text embeddings have {dim} values per token, but model.text_dim is "
            f"{model.text_dim}. Set model.text_dim: {dim}, or encode the captions again with another text encoder"
        )


def text_info(location: str | Path, manifest: Manifest) -> TextInfo:
    """Return `manifest.text`. Raises InputError, naming the remedy, for a set without texts."""
    if manifest.text is None:
        raise InputError(
            f"dataset {location}: has no text embeddings; encode them with a `text` section in its recipe, or name the "
            "companion set that has them: `text`, beside its `path`"
        )
    return manifest.text
