"""Adaptive layer norm: conditions scale and shift what the norm leaves (Peebles & Xie 2023, adaLN)."""

from __future__ import annotations

from torch import Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (b n d), shift and scale broadcastable to it, usually (b 1 d): x (1 + scale) + shift."""
    return x * (1 + scale) + shift
