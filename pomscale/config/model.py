"""The network's part of a recipe: fields of all trunks, and those that pictures and clips add."""

from __future__ import annotations

import difflib
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from pomscale.config.block import (
    AlignmentConfig,
    BlockConfig,
    DropoutConfig,
    FeedForwardName,
    GatesName,
    InContextConfig,
    NormName,
    PatchEmbeddingConfig,
    PositionsName,
    TextName,
    TimeEmbeddingName,
)
from pomscale.config.mixer import (
    AttentionMixerConfig,
    Mixer,
    MixerField,
    MixerName,
    PomMixerConfig,
    check_mixer,
    resolve_mixer,
)
from pomscale.config.presets import IMAGE_PRESETS, PRESETS, VIDEO_PRESETS
from pomscale.config.section import GrownSection, NonNegativeInt


def _nearest_preset(name: str) -> str:
    return difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]


class TrunkConfig(GrownSection):
    """Blocks of a network. A preset fills every field that the recipe does not set."""

    _later = frozenset(
        {"norm", "ffn", "gates", "positions", "time_embedding", "patch_embedding", "in_context", "dropout", "alignment"}
    )

    _presets: ClassVar[dict[str, dict[str, Any]]]
    _num_axes: ClassVar[Literal[2, 3]]
    """Number of axes of a token's position."""

    dim: PositiveInt = Field(description="Width of the trunk.")
    depth: PositiveInt = Field(description="Number of blocks.")
    patch_size: PositiveInt = Field(2, description="Latent pixels per side of one token.")
    patch_embedding: PatchEmbeddingConfig = PatchEmbeddingConfig()
    positions: PositionsName = Field(
        "sincos",
        description="Fixed positions that are added to the tokens, beside rope in the mixers. sincos: waves of places "
        "from 0 to 1 along each side (HoMM); sincos_integer: of rows and columns (JiT); none.",
    )
    time_embedding: TimeEmbeddingName = Field(
        "noise_step",
        description="noise_step: dim features of 1000 t, hidden width 4 dim (HoMM); data_fraction: 256 features of "
        "1 - t, hidden width dim (JiT, whose time is 1 for data).",
    )
    in_context: InContextConfig | None = Field(
        None, description="Pictures: tokens of the class beside those of the picture; null = none."
    )
    dropout: DropoutConfig | None = Field(None, description="Dropout in training; null = none.")
    alignment: AlignmentConfig | None = Field(
        None,
        description="Projection for the alignment loss (diffusion.alignment), part of the network in training alone; "
        "null = none.",
    )
    norm: NormName = Field("layer", description="layer: without weights; rms: RMS norms, each with a weight.")
    gates: GatesName = Field(
        "1+g", description="Factor of what a mixer or feed-forward adds: 1 + g or g, where g depends on the condition."
    )
    ffn: FeedForwardName = Field(
        "gelu", description="Feed-forward: two maps around a GELU, or SwiGLU, of three maps and 2/3 of the width."
    )
    ffn_expansion: PositiveInt = Field(2, description="Feed-forward width over dim.")
    mixer: MixerField = Field(
        "pom",
        description="Mixer of all blocks, or a list that is repeated until depth is reached (a hybrid). A mixer is a "
        "name or a table, e.g. {kind: pom, form: coefficients, heads: 16, rope: true}.",
    )
    degree: PositiveInt = Field(2, description="PoM: degree k of the polynomial, unless the mixer's table has one.")
    expand: PositiveInt = Field(
        2, description="PoM: width of one polynomial piece over dim, unless the mixer's table has one."
    )
    num_heads: PositiveInt = Field(16, description="Attention: number of heads, unless the mixer's table has one.")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        # An unknown preset is filled from the nearest one, so that its other keys are checked in the same pass.
        return values if preset is None else {**PRESETS[_nearest_preset(str(preset))], **values}

    @field_validator("preset", check_fields=False)
    @classmethod
    def _known_preset(cls, preset: str | None) -> str | None:
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"unknown model {preset!r}; did you mean {_nearest_preset(preset)!r}?")
        if preset is not None and preset not in cls._presets:
            kinds = ("image", "video") if preset in IMAGE_PRESETS else ("video", "image")
            raise ValueError(f"{preset!r} is a model of kind {kinds[0]}, and model.kind is {kinds[1]}")
        return preset

    @model_validator(mode="after")
    def _check_trunk(self) -> TrunkConfig:
        if self.dim % 4:
            raise ValueError(f"dim: positions need a multiple of 4, got {self.dim}")
        if self.depth % len(self._pattern):
            raise ValueError(f"mixer: a pattern of {len(self._pattern)} does not divide depth {self.depth}")
        for number, written in enumerate(self._pattern):
            key = f"mixer.{number}" if isinstance(self.mixer, list) else "mixer"
            check_mixer(key, written, self._resolved(written), self.dim)
        if self.positions == "none" and not self.has_rope:
            raise ValueError("positions: none leaves tokens without any; set rope: true in a mixer, or sincos here")
        if self.in_context is not None and self.in_context.start >= self.depth:
            raise ValueError(f"in_context.start: {self.in_context.start} is no block; they are 0 to {self.depth - 1}")
        if self.alignment is not None and self.alignment.block > self.depth:
            raise ValueError(f"alignment.block: {self.alignment.block}, but there are only {self.depth} blocks")
        if self.dropout is not None and not any(block.dropout for block in self.blocks):
            raise ValueError(
                f"dropout: its range, {self.dropout.first} to {self.dropout.last}, has no block; they are "
                f"0 to {self.depth - 1}"
            )
        return self

    @property
    def _pattern(self) -> list[MixerName | PomMixerConfig | AttentionMixerConfig]:
        return self.mixer if isinstance(self.mixer, list) else [self.mixer]

    def _resolved(self, written: MixerName | PomMixerConfig | AttentionMixerConfig) -> Mixer:
        return resolve_mixer(
            written, degree=self.degree, expand=self.expand, num_heads=self.num_heads, num_axes=self._num_axes
        )

    @property
    def mixers(self) -> list[Mixer]:
        """The mixer of every block, length `depth`."""
        return [self._resolved(written) for written in self._pattern] * (self.depth // len(self._pattern))

    @property
    def block(self) -> BlockConfig:
        """Choices that all blocks share beside their mixers."""
        return BlockConfig(self.dim, self.ffn_expansion, self.ffn, self.norm, self.gates)

    @property
    def blocks(self) -> list[BlockConfig]:
        """Choices of every block beside its mixer, length `depth`."""
        rates = [0.0 if self.dropout is None else self.dropout.rate_of(n) for n in range(self.depth)]
        return [replace(self.block, dropout=rate, number=number) for number, rate in enumerate(rates)]

    @property
    @abstractmethod
    def token_grid(self) -> tuple[int, ...]:
        """Tokens of a sample of `latent_shape` by row and column; by frame group, row and column in clips."""

    @property
    @abstractmethod
    def has_cross_mixers(self) -> bool:
        """Whether every block has a cross mixer, which reads a text."""

    @property
    def context_start(self) -> int | None:
        """Number of the first block that reads tokens in context; None = there are none."""
        return None if self.in_context is None else self.in_context.start

    def num_block_tokens(self, number: int, text_length: int) -> int:
        """Return the tokens of a sample that a block mixes, those in context among them.

        text_length is the number of tokens of its text, padding included.
        """
        if self.context_start is None or number < self.context_start:
            return self.num_tokens
        return self.num_tokens + (text_length if self.in_context is None else self.in_context.tokens)

    @property
    def has_rope(self) -> bool:
        """Whether some mixer rotates its tokens by their positions."""
        return any(mixer.rope is not None for mixer in self.mixers)

    @property
    def num_tokens(self) -> int:
        """Tokens of a sample of `latent_shape`."""
        return math.prod(self.token_grid)

    def _check_sides(self, height: int, width: int) -> None:
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"latent_shape: {height}x{width} is not divisible by patch_size {self.patch_size}")


class ImageModelConfig(TrunkConfig):
    """Pictures of a class (DiPoM, DiT), or of a text."""

    _later = TrunkConfig._later | {"text_dim", "text", "text_start"}

    _presets = IMAGE_PRESETS
    _num_axes = 2

    kind: Literal["image"] = "image"
    preset: str | None = Field(
        None,
        description="Named size, e.g. dipom-xl-2; other fields override it.",
        json_schema_extra={"enum": [None, *IMAGE_PRESETS]},
    )
    latent_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(description="(channels, height, width).")
    num_classes: PositiveInt | None = Field(
        None, description="Classes of the dataset; the null class is added by the model. null: pictures of a text."
    )
    text_dim: PositiveInt | None = Field(
        None, description="Width of the text embeddings: 4096 for T5-XXL. null: pictures of a class."
    )
    text: TextName = Field(
        "cross",
        description="cross: a cross mixer in every block reads the text, as in models of clips; in_context: its tokens "
        "are put before those of the picture.",
    )
    text_start: NonNegativeInt = Field(
        0, description="text in_context: number of the block, from 0, that is the first to read it."
    )

    @model_validator(mode="after")
    def _check(self) -> ImageModelConfig:
        self._check_sides(*self.latent_shape[1:])
        if self.num_classes is not None and self.text_dim is not None:
            raise ValueError("text_dim: pictures are of a class or of a text; leave out num_classes or text_dim")
        if self.text_dim is None:
            self._check_without_text()
        else:
            self._check_text()
        return self

    def _check_without_text(self) -> None:
        if "text" in self.model_fields_set or "text_start" in self.model_fields_set:
            raise ValueError(
                "text_dim: pictures of a text need the width of its embeddings, 4096 for T5-XXL; for pictures of a "
                "class leave out text and text_start, and a preset whose name ends in -text"
            )
        if self.num_classes is None:
            raise ValueError(
                "num_classes: give the number of classes of the dataset, or, for pictures of a text, text_dim"
            )

    def _check_text(self) -> None:
        if self.in_context is not None:
            raise ValueError(
                "in_context: these are tokens of a class, and pictures of a text have none; set in_context: null, and "
                "text: in_context for the tokens of the text"
            )
        if self.text == "cross" and self.text_start:
            raise ValueError("text_start: is for text: in_context; cross mixers are in all blocks")
        if self.text_start >= self.depth:
            raise ValueError(f"text_start: {self.text_start} is no block; they are 0 to {self.depth - 1}")

    @property
    def has_cross_mixers(self) -> bool:
        """Whether every block has a cross mixer, which reads a text."""
        return self.text_dim is not None and self.text == "cross"

    @property
    def context_start(self) -> int | None:
        """Number of the first block that reads tokens in context; None = there are none."""
        if self.text_dim is None:
            return super().context_start
        return None if self.has_cross_mixers else self.text_start

    @property
    def token_grid(self) -> tuple[int, int]:
        """Tokens of a sample of `latent_shape` by row and column."""
        _, height, width = self.latent_shape
        return height // self.patch_size, width // self.patch_size


class VideoModelConfig(TrunkConfig):
    """Clips of a text (V-DiPoM, and the same trunk with attention); pictures are clips of one frame."""

    _presets = VIDEO_PRESETS
    _num_axes = 3

    kind: Literal["video"]
    preset: str | None = Field(
        None,
        description="Named size, e.g. vdipom-xl-2; other fields override it.",
        json_schema_extra={"enum": [None, *VIDEO_PRESETS]},
    )
    latent_shape: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = Field(
        description="(channels, frames, height, width) of the largest clips; smaller ones may be trained on with them."
    )
    text_dim: PositiveInt = Field(description="Width of the text embeddings: 4096 for T5-XXL.")
    patch_frames: PositiveInt = Field(2, description="Latent frames of one token; so many are a frame group.")
    temporal: Literal["none", "block_causal"] = Field(
        "none",
        description="Mask of the self mixers. none: every token reads the whole clip; block_causal: its own frame "
        "group and all earlier ones, so that clips can be generated group by group.",
    )

    @model_validator(mode="after")
    def _check(self) -> VideoModelConfig:
        _, frames, height, width = self.latent_shape
        self._check_sides(height, width)
        if frames % self.patch_frames:
            raise ValueError(f"latent_shape: {frames} frames are not divisible by patch_frames {self.patch_frames}")
        if self.in_context is not None:
            raise ValueError("in_context: clips have a text and no class; leave it out")
        return self

    @property
    def has_cross_mixers(self) -> bool:
        """Whether every block has a cross mixer, which reads a text."""
        return True

    @property
    def num_groups(self) -> int:
        """Frame groups of the largest clip."""
        return self.latent_shape[1] // self.patch_frames

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """Tokens of a sample of `latent_shape` by frame group, row and column."""
        _, _, height, width = self.latent_shape
        return self.num_groups, height // self.patch_size, width // self.patch_size


def kind(value: Any) -> str:
    """Return the kind of a network, as written or as its preset has it.

    The function is named like its key, since pydantic's errors name it.
    """
    if not isinstance(value, dict):
        return str(getattr(value, "kind", "image"))
    of_preset = "video" if _nearest_preset(str(value.get("preset"))) in VIDEO_PRESETS else "image"
    return str(value.get("kind", of_preset if value.get("preset") else "image"))


ModelConfig = Annotated[
    Union[Annotated[ImageModelConfig, Tag("image")], Annotated[VideoModelConfig, Tag("video")]], Discriminator(kind)
]


def of_shape(model: ImageModelConfig | VideoModelConfig, shape: Sequence[int]) -> ImageModelConfig | VideoModelConfig:
    """Return the config of a network for latents of `shape`, which may be a picture's where clips are trained on."""
    channels, *frames, height, width = shape
    if isinstance(model, VideoModelConfig):
        frames = [max([*frames, model.patch_frames])]
    return model.model_copy(update={"latent_shape": (channels, *frames, height, width)})
