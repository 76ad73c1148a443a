"""Choices of a trunk beside its mixers: norms, feed-forward, gates, patch embedding and in-context tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from pomscale.config.section import NonNegativeInt, Section

NormName = Literal["layer", "rms"]
FeedForwardName = Literal["gelu", "swiglu"]
GatesName = Literal["1+g", "g"]
PositionsName = Literal["sincos", "sincos_integer", "none"]
TimeEmbeddingName = Literal["noise_step", "data_fraction"]
TextName = Literal["cross", "in_context"]


class PatchEmbeddingConfig(Section):
    """Map from the values of a patch to a token."""

    bottleneck: PositiveInt | None = Field(
        None, description="Width between two linear maps, the first without bias (JiT); null = one linear map."
    )


class InContextConfig(Section):
    """Tokens of the class that are put before those of the picture (JiT); the head does not read them."""

    tokens: PositiveInt = Field(description="Number of tokens: the class embedding plus a learned vector each.")
    start: NonNegativeInt = Field(description="Number of the block, from 0, that is the first to read them.")


class AlignmentConfig(Section):
    """Projection of hidden states to a teacher's features, for the alignment loss in training (REPA)."""

    block: PositiveInt = Field(description="Number of blocks that the hidden states have passed.")
    dim: PositiveInt = Field(description="Width of the teacher's features, e.g. 768 of DINOv2-B.")
    hidden: PositiveInt = Field(2048, description="Width between the three linear maps of the projection.")


class DropoutConfig(Section):
    """Dropout in training, of what attention adds and of the hidden features of the feed-forward (JiT)."""

    rate: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="Share of the numbers that are set to 0.")
    first: NonNegativeInt = Field(0, description="Number of the first block with dropout, from 0.")
    last: NonNegativeInt | None = Field(None, description="Number of the last block with dropout; null = of all.")

    def rate_of(self, number: int) -> float:
        """Return the rate in a block."""
        return self.rate if self.first <= number and (self.last is None or number <= self.last) else 0.0


@dataclass(frozen=True)
class BlockConfig:
    """Choices of a block beside its mixer; the fields are those of `TrunkConfig`."""

    dim: int
    ffn_expansion: int
    ffn: FeedForwardName = "gelu"
    norm: NormName = "layer"
    gates: GatesName = "1+g"
    dropout: float = 0.0
    number: int = 0
    """Number of the block, by which its dropout differs from that of others."""

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward's hidden features; SwiGLU, with three maps for two, has two thirds of it."""
        width = self.ffn_expansion * self.dim
        return width * 2 // 3 if self.ffn == "swiglu" else width
