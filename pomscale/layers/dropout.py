"""Dropout whose mask is a function of the sample, and of nothing that the process has drawn before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Two rounds of multiplication and shift (Wellons 2018, `lowbias32`), and the golden ratio; all modulo 2^32.
_FIRST, _SECOND, _STEP = 0x7FEB352D, 0x846CA68B - 2**32, 0x9E3779B9


class Dropout(nn.Module):
    """Set a share `rate` of the numbers of x (b n d) to 0, and divide the others by 1 - rate.

    The mask hashes a seed per sample, the number of this layer, the token and the channel. So it is the same on any
    number of ranks, whoever holds the tokens, and where activation checkpointing runs a block again; nothing is drawn.

    Args:
        rate: Share of the numbers, in [0, 1).
        number: Number of this layer in its network.
    """

    def __init__(self, rate: float, number: int) -> None:
        super().__init__()
        self.rate, self.number = rate, number

    def forward(self, x: Tensor, seeds: Tensor | None, first_token: int = 0) -> Tensor:
        """Return x with zeros. seeds (b,) int64 from 0 to 2^31 - 1; None = no dropout, as when sampling."""
        if seeds is None or self.rate == 0:
            return x
        dropped = _hashed(seeds, self.number, x.shape[1:], first_token) < round((self.rate - 0.5) * 2**32)
        return (x / (1 - self.rate)).masked_fill(dropped, 0.0)


def _hashed(seeds: Tensor, number: int, shape: torch.Size, first_token: int) -> Tensor:
    """Return uniform int32 (b n d) of seeds (b,)."""
    of_layer = (number * _STEP) % 2**31
    of_sample = _mixed(torch.bitwise_xor(seeds, of_layer).to(torch.int32))
    num_tokens, width = shape
    index = torch.arange(num_tokens * width, dtype=torch.int32, device=seeds.device) + first_token * width
    return _mixed(torch.bitwise_xor(of_sample[:, None], _mixed(index))).view(-1, num_tokens, width)


def _mixed(x: Tensor) -> Tensor:
    """Mix the bits of int32 x in place; each bit of the result depends on all of x."""
    for shift, factor in ((16, _FIRST), (15, _SECOND), (16, None)):
        x ^= (x >> shift).bitwise_and_(2 ** (32 - shift) - 1)  # a shift of int32 fills with the sign
        if factor is not None:
            x *= factor
    return x
