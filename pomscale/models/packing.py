"""Packed samples: the tokens of samples of any shapes one after another in one sequence, without padding.

Shapes: N tokens in all, U units that have a time of their own (samples, or frame groups), d width of the trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from pomscale.layers import Attention, Dropout, PoM, Units
from pomscale.ops.pom import BlockCausal, Segments


@dataclass(frozen=True)
class Packing:
    """Places of packed tokens.

    Attributes:
        samples: Tokens of each sample.
        times: Tokens of each unit with a time of its own: of each sample, or of each frame group.
        texts: Tokens of the text that each unit of `times` reads; None = there are no texts.
        frame_lengths: Tokens of a frame group of each sample under the block-causal mask; None = no such mask.
    """

    samples: Units
    times: Units
    texts: Units | None = None
    frame_lengths: tuple[int, ...] | None = None

    @cached_property
    def cross_mask(self) -> Segments:
        """Mask of the cross mixers."""
        assert self.texts is not None
        return Segments(self.times.lengths, self.texts.lengths)

    @cached_property
    def self_masks(self) -> tuple[tuple[slice, Segments], ...]:
        """Masks of the self mixers, each with the tokens that it is for: those of one length of frame groups."""
        lengths, frames = self.samples.lengths, self.frame_lengths
        if frames is None:
            return ((slice(0, self.samples.num_tokens), Segments(lengths)),)
        found, start = [], 0
        for frame_length, equal in groupby(zip(lengths, frames, strict=True), key=lambda pair: pair[1]):
            of_mask = [length for length, _ in equal]
            stop = start + sum(of_mask)
            found.append((slice(start, stop), Segments(of_mask, inner=BlockCausal(frame_length))))
            start = stop
        return tuple(found)

    def mix(self, mixer: PoM | Attention, x: Tensor, positions: Tensor | None) -> Tensor:
        """Let every token of x (1 N d) read its own sample; positions (N axes) are for mixers with rope."""
        positions = None if mixer.rope is None else positions
        mixed = [
            mixer(x[:, tokens], mask=mask, positions=None if positions is None else positions[tokens])
            for tokens, mask in self.self_masks
        ]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)

    def drop(self, dropout: Dropout, x: Tensor, seeds: Tensor | None) -> Tensor:
        """Drop from x (1 N d) what `dropout` drops from each sample alone; seeds (samples,)."""
        if seeds is None or dropout.rate == 0:
            return x
        parts = [dropout(run.of_tokens(x), seeds[run.first : run.last]) for run in self.samples.runs]
        return torch.cat([part.flatten(0, 1) for part in parts])[None]


def packed_tokens(parts: Sequence[Tensor]) -> Tensor:
    """Return the tokens (b n d) of samples of several shapes in one sequence, (1 N d)."""
    return torch.cat([part.flatten(0, 1) for part in parts])[None]


def of_shapes(x: Tensor, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Cut x (1 N d) into the tokens (b n d) of each shape; grids: b and n of each."""
    parts = x[0].split([batch * length for batch, length in grids])
    return [part.unflatten(0, grid) for part, grid in zip(parts, grids, strict=True)]
