"""What is fixed of a mixer beside its weights: the polynomial, its gates and its rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

FormName = Literal["product", "coefficients"]


def check_count(name: str, value: object, minimum: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < minimum:
        raise ValueError(f"{name}: expected a whole number of at least {minimum}, got {value!r}")


@dataclass(frozen=True)
class Form:
    """One of the two polynomials of the papers, with its gates.

    product (PoM v1, arXiv 2411.12663): u has k D channels; a token's features are the k cumulative products of the
        pieces of GELU(u), W = k D channels; one sigmoid gate per channel.
    coefficients (PoM v2, arXiv 2604.06129): u has D channels; a token's features are sum_m c[:, m] v^m of
        v = clamp(leaky_relu(u), -0.1, 6), W = D channels; hardsigmoid gates, one per channel or per head.

    degree: k. heads: number S of gates, each shared by D/S neighbouring channels; 1 = a gate per channel, as in the
    authors' code. rope: number of axes of the rotary positions, or None.
    Raises ValueError for a degree below 1, and for heads or rotary positions of the product form, which has neither.
    """

    name: FormName = "product"
    degree: int = 2
    heads: int = 1
    rope: Literal[1, 2, 3] | None = None

    def __post_init__(self) -> None:
        if self.name not in ("product", "coefficients"):
            raise ValueError(f"form: expected 'product' (PoM v1) or 'coefficients' (PoM v2), got {self.name!r}")
        check_count("degree", self.degree)
        check_count("heads", self.heads)
        if self.rope not in (None, 1, 2, 3) or isinstance(self.rope, bool | float):
            raise ValueError(f"rope: expected None or 1, 2 or 3 axes, got {self.rope!r}")
        if self.name == "product" and (self.heads != 1 or self.rope is not None):
            raise ValueError("form 'product' (PoM v1) has neither heads nor rope; use form 'coefficients'")

    def num_features(self, num_channels: int) -> int:
        """Return the width W of a token's features, given that of u. Raises ValueError if the degree does not fit."""
        if self.name == "product" and num_channels % self.degree:
            raise ValueError(f"degree: {self.degree} does not divide the {num_channels} channels")
        return num_channels

    def num_gates(self, num_features: int) -> int:
        """Return the number of gates of a query. Raises ValueError if the heads do not divide the features."""
        if num_features % self.heads:
            raise ValueError(f"heads: {self.heads} do not divide the {num_features} channels")
        return num_features if self.heads == 1 else self.heads
