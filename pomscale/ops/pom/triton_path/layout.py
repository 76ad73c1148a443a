"""How tokens are dealt out to programs: groups that share a state, and items, the runs of tokens of one program.

A group's queries read one mean: all tokens without a mask, a frame, a segment. Items never cross a group's border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

# An item has 64 tokens, so that its partial (4 bytes a channel) is a small part of what it reads (128 bytes a channel
# in bf16), and more in long sequences, so that a channel has at most 256 partials to add one after another.
SHORTEST_ITEM = 64
MOST_ITEMS = 256


@dataclass(frozen=True)
class Layout:
    """Tables on the device of a kernel.

    items: (items 3) int32, of each item the first token, one past the last, and `third`: its group, or in scans the
        first token of its segment.
    group_items: (groups + 1) int32, first item of each group and the end of the last.
    segment_rows: (segments + 1) int32, the same of the groups of each segment, in scans of its items.
    counts: (1 groups) int64, tokens that the queries of a group read, those of earlier groups of its segment included.
    """

    items: Tensor
    group_items: Tensor
    segment_rows: Tensor
    counts: Tensor

    @property
    def num_items(self) -> int:
        return self.items.shape[0]

    @property
    def num_groups(self) -> int:
        return self.group_items.shape[0] - 1

    @property
    def num_segments(self) -> int:
        return self.segment_rows.shape[0] - 1


def group_lengths(lengths: Sequence[int], frame_length: int) -> list[list[int]]:
    """Return the number of tokens of each group of each segment; without frames (0) a segment is one group."""
    if not frame_length:
        return [[length] for length in lengths]
    return [[min(frame_length, length - start) for start in range(0, length, frame_length)] for length in lengths]


def item_length(num_tokens: int) -> int:
    """Return the tokens of an item: a power of two that depends on the tokens of a sample alone."""
    length = SHORTEST_ITEM
    while length * MOST_ITEMS < num_tokens:
        length *= 2
    return length


def grouped(lengths: Sequence[int], frame_length: int, device: torch.device) -> Layout:
    """Return the layout of segments of `lengths` tokens whose groups are frames, or the segments themselves (0)."""
    return _grouped(tuple(lengths), frame_length, item_length(sum(lengths)), device)


def scanned(lengths: Sequence[int], device: torch.device) -> Layout:
    """Return the layout of segments of `lengths` tokens in which each token reads those up to itself."""
    return _scanned(tuple(lengths), item_length(sum(lengths)), device)


# The tables of a mask are the same in every layer and step; a copy to the device each time would wait for the host.
@lru_cache(maxsize=256)
def _grouped(lengths: tuple[int, ...], frame_length: int, longest: int, device: torch.device) -> Layout:
    segments = group_lengths(lengths, frame_length)
    items, group_items, counts, start = [], [0], [], 0
    for groups in segments:
        counts += list(accumulate(groups))
        for length in groups:
            items += [(first, last, len(group_items) - 1) for first, last in _runs(start, start + length, longest)]
            group_items.append(len(items))
            start += length
    segment_rows = [0, *accumulate(len(groups) for groups in segments)]
    return _layout(items, group_items, segment_rows, counts, device)


@lru_cache(maxsize=256)
def _scanned(lengths: tuple[int, ...], longest: int, device: torch.device) -> Layout:
    items, segment_rows, start = [], [0], 0
    for length in lengths:
        items += [(first, last, start) for first, last in _runs(start, start + length, longest)]
        segment_rows.append(len(items))
        start += length
    return _layout(items, range(len(items) + 1), segment_rows, (), device)


def _runs(start: int, stop: int, longest: int) -> list[tuple[int, int]]:
    return [(first, min(first + longest, stop)) for first in range(start, stop, longest)]


def _layout(
    items: Sequence[tuple[int, int, int]],
    group_items: Sequence[int],
    segment_rows: Sequence[int],
    counts: Sequence[int],
    device: torch.device,
) -> Layout:
    with torch.inference_mode(False):  # the tables outlive the call that makes them
        return Layout(
            torch.tensor(items, dtype=torch.int32).reshape(-1, 3).to(device),
            torch.tensor(list(group_items), dtype=torch.int32).to(device),
            torch.tensor(list(segment_rows), dtype=torch.int32).to(device),
            torch.tensor(list(counts), dtype=torch.int64)[None].to(device),
        )
