"""Settings of a mixer that is measured: sizes, form, mask, dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pomscale.layers import PoM
from pomscale.ops.pom import BlockCausal, Mask, Segments

FormLabel: TypeAlias = Literal["product", "coefficients", "heads", "rope"]
MaskLabel: TypeAlias = Literal["none", "causal", "block-causal", "padding", "segments"]
DtypeLabel: TypeAlias = Literal["fp64", "fp32", "bf16"]

DTYPES: dict[DtypeLabel, torch.dtype] = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
_FRAMES = 10
# Lengths of the segments, as shares of the tokens: packed pictures of different sizes.
_SHARES = (1, 2, 3, 4)
_CHECKED_TOKENS = 67  # no multiple of a chunk, a frame or a vector
_CHUNKED_TOKENS, _CHUNKED_DIM = 1100, 64  # more than a chunk of a thousand tokens, narrow so that the oracle is quick


@dataclass(frozen=True)
class Case:
    """One setting.

    Attributes:
        num_tokens: N, both queries and context.
        dim: Width d of the tokens.
        form: product (v1), coefficients (v2, a gate per channel), heads (v2 with selection heads), rope (the same with
            rotary positions of rows and columns).
        degree: k.
        expand: D/d.
        heads: Number of selection heads, of the last two forms.
        mask: block-causal has ten frames, padding the last quarter of the tokens, segments four of unequal lengths.
        batch: B.
        dtype: Type of weights and tokens.
    """

    num_tokens: int = 1024
    dim: int = 1152
    form: FormLabel = "product"
    degree: int = 2
    expand: int = 2
    heads: int = 16
    mask: MaskLabel = "none"
    batch: int = 1
    dtype: DtypeLabel = "fp32"

    def __str__(self) -> str:
        heads = f" {self.heads}" if self.form in ("heads", "rope") else ""
        return (
            f"N {self.num_tokens} d {self.dim} {self.form}{heads} k {self.degree} e {self.expand} "
            f"mask {self.mask} B {self.batch} {self.dtype}"
        )

    @property
    def curve(self) -> Case:
        """The case without its number of tokens, which names the curve that it is a point of."""
        return replace(self, num_tokens=0)

    @property
    def checked(self) -> Case:
        """The small case of the same kind that is compared with the oracle."""
        return replace(self, num_tokens=_CHECKED_TOKENS)

    @property
    def checked_in_chunks(self) -> Case:
        """The narrow case of the same kind that has more tokens than a path takes at once."""
        return replace(self, num_tokens=_CHUNKED_TOKENS, dim=min(self.dim, _CHUNKED_DIM), batch=1)

    @property
    def num_channels(self) -> int:
        """Width of the pre-activations u: k D of the product form, D of the other."""
        return self.expand * self.dim * (self.degree if self.form == "product" else 1)

    @property
    def unit_bytes(self) -> int:
        """Bytes of u, the unit of memory of the figures."""
        return self.batch * self.num_tokens * self.num_channels * DTYPES[self.dtype].itemsize

    @property
    def is_dense(self) -> bool:
        """Whether a mixer without a form of its own for the mask needs n x n numbers."""
        return self.mask in ("causal", "block-causal", "segments")

    def make_layer(self) -> PoM:
        """Build the layer with random weights that leave none of its parts out."""
        heads = self.heads if self.form in ("heads", "rope") else 1
        arguments: dict[str, Any] = {"form": "product" if self.form == "product" else "coefficients", "heads": heads}
        layer = PoM(self.dim, self.degree, self.expand, rope=2 if self.form == "rope" else None, **arguments)
        randomize(layer)
        return layer

    def make_input(self, device: torch.device) -> Tensor:
        """Return random tokens (b n d)."""
        return torch.randn(self.batch, self.num_tokens, self.dim, device=device).to(DTYPES[self.dtype])

    def make_mask(self, device: torch.device) -> Mask:
        """Return the mask in its leanest form."""
        if self.mask == "causal":
            return "causal"
        if self.mask == "block-causal":
            return BlockCausal(max(1, self.num_tokens // _FRAMES))
        if self.mask == "segments":
            lengths = [self.num_tokens * share // sum(_SHARES) for share in _SHARES[:-1]]
            return Segments([*lengths, self.num_tokens - sum(lengths)])
        if self.mask == "padding":
            last = self.num_tokens - self.num_tokens // 4
            return (torch.arange(self.num_tokens, device=device) < last).expand(self.batch, -1)
        return None

    def make_positions(self, device: torch.device) -> Tensor | None:
        """Return rows and columns (n 2) of a square grid, for rotary positions alone."""
        if self.form != "rope":
            return None
        number = torch.arange(self.num_tokens, device=device)
        return torch.stack([number // self.side, number % self.side], dim=1)

    @property
    def side(self) -> int:
        """Rows and columns of the smallest square grid that holds the tokens."""
        return math.isqrt(self.num_tokens - 1) + 1


def randomize(layer: torch.nn.Module) -> None:
    """Draw biases and coefficients, too: their initial values are nearly 0, which would hide errors."""
    for name, parameter in layer.named_parameters():
        if "coeff" in name:
            torch.nn.init.normal_(parameter, 0, 0.5)
        elif parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0, 0.1)
