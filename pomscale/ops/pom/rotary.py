"""Rotary positions in one, two or three axes (PoM v2; the authors' PoMRoPE has one and two).

A vector of width W is cut into one block of channels per axis. A block of 2 P channels holds P pairs, channel c with
channel c + P, and axis a turns pair c by the angle position_a * 10000^(-c / P):

    one axis:     P = W/2
    two axes:     row, column: P = W/4 each
    three axes:   frame group, row, column: of the W/2 pairs, row and column have the nearest whole number to a third
                  each, the frame group has the rest (W = 12: 2, 2, 2; W = 16: 2, 3, 3; W = 20: 4, 3, 3)

The gates of S > 1 heads are turned as a vector of width S in the same way, except that with one axis pair c turns by
the frequency that the features have at channel c * (head width // 2), as in the authors' code.

Angles, sines and cosines are computed in fp32 from the integer positions of the tokens at hand; nothing is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BASE = 10_000.0
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def num_pairs(width: int, num_axes: int, what: str = "channels") -> tuple[int, ...]:
    """Return the number of pairs of each axis. Raises ValueError for a width that has no pair for some axis."""
    pairs = width // 2
    if num_axes == 3:
        side = (pairs + 1) // 3
        split: tuple[int, ...] = (pairs - 2 * side, side, side)
    else:
        split = (pairs // num_axes,) * num_axes
    if 2 * sum(split) != width or min(split) < 1:
        needs = {1: "an even number", 2: "a multiple of 4", 3: "an even number of at least 6"}[num_axes]
        raise ValueError(f"rope={num_axes} needs {needs} of {what}, got {width}")
    return split


def check_rotary(num_features: int, heads: int, num_axes: int) -> None:
    """Raise ValueError unless features and gates can be turned along `num_axes` axes."""
    num_pairs(num_features, num_axes)
    if heads > 1:
        num_pairs(heads, num_axes, "heads")
        if num_axes == 1 and num_features < 2 * heads:  # the rule of frequencies would turn all of them alike
            raise ValueError(f"rope=1 needs heads of at least 2 channels, got {heads} heads of {num_features} channels")


def check_positions(name: str, positions: Tensor | None, num_axes: int | None, batch: int, num_tokens: int) -> None:
    """Raise ValueError unless `positions` are what a mixer with `num_axes` (None: without rope) needs."""
    if num_axes is None:
        if positions is not None:
            raise ValueError(f"{name}: expected None for a mixer without rope, got {_described(positions)}")
        return
    expected = [(num_tokens, num_axes), (batch, num_tokens, num_axes)]
    if positions is None:
        raise ValueError(
            f"{name}: a mixer with rope={num_axes} needs integers of shape {expected[0]} or {expected[1]}, got None"
        )
    if not isinstance(positions, Tensor) or positions.dtype not in _INTEGERS or tuple(positions.shape) not in expected:
        raise ValueError(
            f"{name}: expected integers of shape {expected[0]} or {expected[1]}, got {_described(positions)}"
        )


def _described(positions: object) -> str:
    if isinstance(positions, Tensor):
        return f"{positions.dtype} of shape {tuple(positions.shape)}"
    return type(positions).__name__


def frequencies(width: int, num_axes: int, device: torch.device, *, head_width: int | None = None) -> list[Tensor]:
    """Return the angle per unit of position of every pair, fp32, one tensor (P_a,) per axis.

    head_width is the number of channels of a head where `width` is that of the gates of heads, else None.
    """
    result = []
    for pairs in num_pairs(width, num_axes):
        index = torch.arange(pairs, dtype=torch.float32, device=device)
        if head_width is not None and num_axes == 1:
            exponent = index * (head_width // 2) / (width * head_width // 2)
        else:
            exponent = index / pairs
        # In the authors' order of operations, so that the last bits agree.
        result.append(1.0 / (_BASE**exponent))
    return result


def cos_sin(
    positions: Tensor, width: int, num_axes: int, *, head_width: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Return cosines and sines (.. n P_a) fp32 of each axis for integer positions (.. n axes)."""
    tables = []
    for axis, frequency in enumerate(frequencies(width, num_axes, positions.device, head_width=head_width)):
        angles = positions[..., axis, None].float() * frequency
        tables.append((angles.cos(), angles.sin()))
    return tables


def rotate(x: Tensor, tables: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Turn x (b n W) by the tables of `cos_sin`; the result has the dtype of x."""
    parts, start = [], 0
    for table in tables:
        cos, sin = (part.to(x.dtype) for part in table)
        pairs = cos.shape[-1]
        first, second = x[..., start : start + pairs], x[..., start + pairs : start + 2 * pairs]
        parts += [first * cos - second * sin, second * cos + first * sin]
        start += 2 * pairs
    return torch.cat(parts, dim=-1)
