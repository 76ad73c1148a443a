"""Recipes of kind `encode`: a source of media and captions, and what is stored of it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import AfterValidator, Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from pomscale.config.codecs import (
    CodecConfig,
    FeaturesConfig,
    Uint8CodecConfig,
)
from pomscale.config.monitoring import WandbConfig
from pomscale.config.section import FolderName, GrownSection, NonNegativeInt, PositiveFloat, Section, Seed
from pomscale.config.text import TextConfig, TextEncoderConfig, text_encoders
from pomscale.config.where import Rule, parse_rule

_FILTER = "Filter that resizes. area: the mean over the area of each new pixel, and bilinear where it enlarges."

_CAPTION_LINES = "Every line of a text is a caption of its own."

_WHERE = "Rules by {}; only {} that meet all of them are taken: '>= 5', '0.5..10', a text, a list of values, '!= text'."


def _checked_rules(rules: dict[str, Rule]) -> dict[str, Rule]:
    for column, rule in rules.items():
        try:
            parse_rule(rule)
        except ValueError as error:
            raise ValueError(f"{column}: {error}") from error
    return rules


Rules = Annotated[dict[str, Rule], AfterValidator(_checked_rules)]


class ImageFolderConfig(Section):
    """A folder with one subfolder of pictures (PNG, JPEG, WebP) per class; classes in sorted order."""

    kind: Literal["image_folder"]
    path: str = Field(description="Local folder or fsspec URL.")


class VideoFolderConfig(Section):
    """A folder of clips (mp4, webm, mkv, mov, avi), at any depth."""

    kind: Literal["video_folder"]
    path: str = Field(description="Local folder or fsspec URL.")
    captions: bool = Field(False, description="Beside every clip lies NAME.txt with its caption.")
    caption_lines: bool = Field(False, description=_CAPTION_LINES)


class TarSourceConfig(GrownSection):
    """WebDataset tars of pictures or clips with their labels and captions, e.g. as img2dataset writes them."""

    _later: ClassVar[frozenset[str]] = frozenset({"where"})

    kind: Literal["tars"]
    path: str | list[str] = Field(description="Local paths or fsspec URLs; wildcards and {000..012} are expanded.")
    media: str | None = Field(
        None, description="Member with the picture or clip, such as jpg or rgb.png; null = the only one there is."
    )
    label: str | None = Field(None, description="Member with the class id: cls, or json:FIELD.")
    caption: str | None = Field(None, description="Member with the caption: txt, or json:FIELD (a text or a list).")
    caption_lines: bool = Field(False, description=_CAPTION_LINES)
    class_names: str | None = Field(None, description="Text file with one class name per line, in the order of ids.")
    where: Rules = Field({}, description=_WHERE.format("field of the json member", "samples"))


class TableSourceConfig(GrownSection):
    """A Parquet, CSV or JSONL table: one row is one picture or clip, named by a path or held as bytes.

    With `ranges`, or `start` and `end`, a row is one or several time ranges of a clip.
    """

    _later: ClassVar[frozenset[str]] = frozenset({"ranges", "start", "end", "where"})

    kind: Literal["table"]
    path: str | list[str] = Field(description="Local paths or fsspec URLs (.parquet, .csv, .jsonl); wildcards.")
    media: str | None = Field(
        None,
        description="Path of the file, relative to `root`, with columns in braces: '{page_dir}/{videoid}.mp4'; "
        "'{id%_*}' is the column without its last _ and what follows.",
    )
    bytes_column: str | None = Field(None, description="Parquet: column that holds the file itself.")
    root: str = Field("", description="Folder or URL that `media` is relative to; '' = as it stands.")
    key: str | None = Field(None, description="Column with a unique key; null = the row's number.")
    caption: str | None = Field(None, description="Column with the caption: texts, or lists of them.")
    caption_lines: bool = Field(False, description=_CAPTION_LINES)
    label: str | None = Field(None, description="Column with the class id.")
    class_names: str | None = Field(None, description="Text file with one class name per line, in the order of ids.")
    ranges: str | None = Field(
        None,
        description="Column with the time range of the clip that a row is, [start, end] in seconds or as 0:00:10.5, or "
        "with a list of them; each is an item, with the element of the same number of other columns that are lists.",
    )
    start: str | None = Field(None, description="Column with the start of a range, or of several; with `end`.")
    end: str | None = Field(None, description="Column with the end of a range, or of several; with `start`.")
    where: Rules = Field({}, description=_WHERE.format("column", "rows (or ranges)"))

    @model_validator(mode="after")
    def _check(self) -> TableSourceConfig:
        if self.media is not None and self.bytes_column is not None:
            raise ValueError("give `media` or `bytes_column`, not both")
        if (self.start is None) != (self.end is None) or (self.start is not None and self.ranges is not None):
            raise ValueError("give `ranges`, or `start` and `end`, or none of them")
        return self

    @property
    def has_ranges(self) -> bool:
        """Whether items are time ranges of clips."""
        return self.ranges is not None or self.start is not None


class LatentsSourceConfig(Section):
    """The captions of an existing dataset: a companion set of text embeddings leaves its latents untouched."""

    kind: Literal["latents"]
    path: str = Field(description="Dataset whose records carry captions.")


RawSourceConfig = ImageFolderConfig | VideoFolderConfig | TarSourceConfig | TableSourceConfig

SourceConfig = Annotated[Union[RawSourceConfig, LatentsSourceConfig], Field(discriminator="kind")]


class ImageTransformConfig(Section):
    """Transform of a picture to pixels: resize so that the target is just covered, then cut out the centre."""

    kind: Literal["image"] = "image"
    size: PositiveInt | None = Field(None, description="Square pictures of this side, in pixels.")
    sizes: list[PositiveInt] = Field([], description="Several square sizes in one pass: datasets OUTPUT/SIZE.")
    buckets: list[tuple[PositiveInt, PositiveInt]] = Field(
        [], description="(height, width) in pixels; a picture goes to the nearest aspect ratio."
    )
    filter: Literal["lanczos", "area", "adm"] = Field(
        "lanczos",
        description=f"{_FILTER} adm: the crop of ADM, DiT and JiT, which halves (BOX) while the shorter side is at "
        "least twice the target, resizes (BICUBIC), then cuts out a square; with `size` or `sizes`.",
    )
    flip: bool = Field(
        False,
        description="Also store the latent of the horizontally flipped picture; codec uint8 stores none, and flips as "
        "it reads.",
    )

    @model_validator(mode="after")
    def _check(self) -> ImageTransformConfig:
        if sum([self.size is not None, bool(self.sizes), bool(self.buckets)]) != 1:
            raise ValueError("give exactly one of `size`, `sizes`, `buckets`")
        for name in ("sizes", "buckets"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"{name}: a value is there twice")
        if self.filter == "adm" and self.buckets:
            raise ValueError("filter: adm cuts out squares; give `size` or `sizes`, or another filter with `buckets`")
        return self

    @property
    def targets(self) -> list[tuple[int, ...]]:
        """Possible (height, width) of a picture in pixels; without `sizes`, each of which is a dataset of its own."""
        return [(self.size, self.size)] if self.size is not None else list(self.buckets)


class VideoTransformConfig(Section):
    """Transform of a clip to frames: resample in time, resize to just cover the target, cut out the centre."""

    kind: Literal["video"]
    fps: PositiveFloat = Field(16.0, description="Frames per second after resampling.")
    buckets: list[tuple[PositiveInt, PositiveInt, PositiveInt]] = Field(
        [(80, 240, 384)],
        min_length=1,
        description="(frames, height, width); a clip goes to the longest it can fill, then the nearest aspect ratio.",
    )
    filter: Literal["lanczos", "area"] = Field("area", description=_FILTER)
    flip: bool = Field(False, description="Also store the latent of the horizontally flipped clip.")
    incomplete: Literal["fail", "keep"] = Field(
        "fail",
        description="Clips that are damaged or cut off before they fill the longest bucket: list them as failed, or "
        "keep what precedes the damage as a shorter clip, marked in its JSON and counted in the manifest.",
    )

    @field_validator("buckets")
    @classmethod
    def _distinct(cls, buckets: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        if len(set(buckets)) != len(buckets):
            raise ValueError("a bucket is there twice")
        return buckets

    @property
    def targets(self) -> list[tuple[int, ...]]:
        """Possible (frames, height, width) of a clip."""
        return list(self.buckets)


def kind(value: Any) -> str:
    """Return the kind of a transform. The function is named like its key, since pydantic's errors name it."""
    return value.get("kind", "image") if isinstance(value, dict) else getattr(value, "kind", "image")


TransformConfig = Annotated[
    Union[
        Annotated[ImageTransformConfig, Tag("image")],
        Annotated[VideoTransformConfig, Tag("video")],
    ],
    Discriminator(kind),
]


def transform_version(transform: TransformConfig | None) -> int:
    """Return the version of the pixels that a transform makes of media.

    Raise it where the same files give other pixels than before: a half-done encode is then refused, and datasets of
    two versions are not merged. Version 2 reads the times, colours and transparency of clips differently, and weighs
    pixels by area (`filter: area`) in pictures, too.
    """
    is_unchanged = transform is None or (transform.kind == "image" and transform.filter != "area")
    return 1 if is_unchanged else 2


def text_version(texts: tuple[TextEncoderConfig, ...]) -> int:
    """Return the version of the tokens that text encoders make of captions; raise it as `transform_version`.

    Version 2 reads "</s>" and other special tokens in a caption as text.
    """
    return 2 if texts else 1


class EncodeRecipe(GrownSection):
    """One dataset of latents, of text embeddings, of both in the same shards, or of a teacher's features."""

    _later: ClassVar[frozenset[str]] = frozenset({"features"})

    kind: Literal["encode"]
    name: FolderName
    output: str = Field(description="Folder that receives shards and manifest.json.")
    seed: Seed = Field(0, description="Seed that deals items to shards, and of posterior draws (store: sample).")
    source: SourceConfig
    codec: CodecConfig | None = Field(None, description="null: no latents, but text embeddings or features.")
    transform: TransformConfig | None = Field(
        None, description="Transform of media to the pixels of the codec or the teacher."
    )
    text: TextConfig | None = Field(
        None,
        description="Also store embeddings of the captions. A list: those of several encoders, which a network sees "
        "one behind the other.",
    )
    features: FeaturesConfig | None = Field(
        None, description="Store a teacher's features of the transformed pictures or clips, and nothing else."
    )
    captions: Literal["random", "first", "join"] = Field(
        "random",
        description="Embeddings of an item with several captions: one of each, of which training draws one per sample; "
        "the first caption's; or one of all captions in one text.",
    )
    shard_samples: PositiveInt = Field(4096, description="Items per shard.")
    batch: PositiveInt = Field(64, description="Items per encoder call.")
    num_workers: PositiveInt = Field(2, description="Threads that decode pictures and clips.")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_skipped: NonNegativeInt = Field(
        0,
        description="Most items that may fail and be left out with exit code 0 instead of 3; all are listed.",
    )
    wandb: WandbConfig = WandbConfig(mode="disabled")

    @model_validator(mode="after")
    def _check(self) -> EncodeRecipe:
        is_of_clips = self.transform is not None and self.transform.kind != "image"
        if getattr(self.source, "has_ranges", False) and self.opens_media and not is_of_clips:
            raise ValueError("source.ranges (start, end): ranges are cut from clips; give a transform of kind video")
        if self.features is not None:
            self._check_features(self.features)
            return self
        if (self.codec is None) != (self.transform is None):
            raise ValueError("codec, transform: give both, or neither for a set of text embeddings only")
        if self.codec is None and self.text is None:
            raise ValueError("codec, text: give at least one of them, or `features`, or there is nothing to encode")
        if isinstance(self.codec, Uint8CodecConfig) and is_of_clips:
            raise ValueError(f"codec.name: {self.codec.name} takes a transform of kind image")
        if self.codec is not None and not _has_media(self.source):
            raise ValueError(f"codec: a source of kind {self.source.kind} without files has captions only")
        if self.text is not None and not has_captions(self.source):
            raise ValueError("text: the source has no captions; set source.caption (or source.captions)")
        if self.captions != "random" and self.text is None:
            raise ValueError("captions: says which captions are embedded, but there is no `text` section")
        if getattr(self.source, "caption_lines", False) and not has_captions(self.source):
            raise ValueError("source.caption_lines: the source has no captions; set source.caption(s), too")
        return self

    def _check_features(self, features: FeaturesConfig) -> None:
        for name in ("codec", "text"):
            if getattr(self, name) is not None:
                raise ValueError(f"features: they are a set of their own, beside the pictures'; leave out `{name}`")
        transform = self.transform
        if transform is None:
            raise ValueError("features: give the transform of the pictures that they belong to")
        if not _has_media(self.source):
            raise ValueError(f"features: a source of kind {self.source.kind} without files has captions only")
        if len(transform.targets) > 1 or (getattr(transform, "buckets", []) and transform.kind == "image"):
            raise ValueError(
                "features: all records of a set have one grid, so give the transform one size, and no further buckets"
            )
        axes = 2 if transform.kind == "image" else 3
        if features.grid is None and axes == 3:
            raise ValueError("features.grid: clips need one, [frame groups, rows, columns]")
        if features.grid is not None and len(features.grid) != axes:
            kinds = {2: "[rows, columns] of pictures", 3: "[frame groups, rows, columns] of clips"}
            raise ValueError(f"features.grid: give {kinds[axes]}")

    @property
    def texts(self) -> tuple[TextEncoderConfig, ...]:
        """The text encoders, in their order."""
        return text_encoders(self.text)

    @property
    def opens_media(self) -> bool:
        """Whether pictures or clips are decoded, and not captions alone encoded."""
        return self.codec is not None or self.features is not None


def _has_media(source: SourceConfig) -> bool:
    if isinstance(source, TableSourceConfig):
        return source.media is not None or source.bytes_column is not None
    return not isinstance(source, LatentsSourceConfig)


def has_captions(source: SourceConfig) -> bool:
    """Return whether every item of the source must have a caption."""
    if isinstance(source, ImageFolderConfig):
        return False
    if isinstance(source, VideoFolderConfig):
        return source.captions
    return isinstance(source, LatentsSourceConfig) or source.caption is not None
