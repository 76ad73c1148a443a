"""Adaptive layer norm: conditions scale and shift what the norm leaves (Peebles & Xie 2023, adaLN)."""

from __future__ import annotations

from torch import Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (1 + scale) + shift for x (b n d); shift and scale broadcast to it and are usually (b 1 d)."""
    return x * (1 + scale) + shift
