"""Tokens of a sequence split over ranks (sequence parallelism), and the sums that a rank needs from the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from pomscale.ops.pom.state import PomState


class Collectives(Protocol):
    """Communication of R ranks as linear maps with exact gradients; every rank calls them in the same order.

    The loss is the sum of what the ranks compute, so the gradient of a tensor sums over its uses on all ranks.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of the x of all ranks, which have one shape."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the x of all ranks, which have one shape, stacked by rank along a new first axis."""
        ...


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of every sample, cut into one run for each of R ranks; frames may straddle the cuts.

    bounds: R + 1 token numbers from 0 to the number of tokens; rank r holds bounds[r] .. bounds[r + 1] - 1.
    rank: this rank. collectives: communication with the others.
    Raises ValueError for bounds that leave a rank without tokens.
    """

    bounds: tuple[int, ...]
    rank: int
    collectives: Collectives

    def __post_init__(self) -> None:
        if self.bounds[0] != 0 or any(end <= begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False)):
            raise ValueError(f"TokenSplit: expected ascending bounds from 0, got {self.bounds}")
        if not 0 <= self.rank < len(self.bounds) - 1:
            raise ValueError(f"TokenSplit: expected a rank below {len(self.bounds) - 1}, got {self.rank}")

    @classmethod
    def even(cls, num_tokens: int, num_ranks: int, rank: int, collectives: Collectives) -> TokenSplit:
        """Split into runs whose lengths differ by at most one. Raises ValueError for fewer tokens than ranks."""
        if num_tokens < num_ranks:
            raise ValueError(f"TokenSplit: {num_tokens} tokens cannot be split over {num_ranks} ranks")
        bounds = (num_tokens * r // num_ranks for r in range(num_ranks + 1))
        return cls(tuple(bounds), rank, collectives)

    @property
    def start(self) -> int:
        """Number of this rank's first token."""
        return self.bounds[self.rank]

    @property
    def stop(self) -> int:
        """Number of the token after this rank's last one."""
        return self.bounds[self.rank + 1]

    @property
    def tokens(self) -> slice:
        """Numbers of this rank's tokens."""
        return slice(self.start, self.stop)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all ranks."""
        return self.bounds[-1]

    def total(self, local: PomState) -> PomState:
        """Return the state of the tokens of all ranks: one all-reduce of (b, W + 1)."""
        # The count travels beside the sum: fp32 holds whole numbers up to 2^24 exactly.
        packed = torch.cat([local.sum, local.count[:, None].to(local.sum.dtype)], dim=1)
        packed = self.collectives.all_reduce(packed)
        return PomState(packed[:, :-1], packed[:, -1].detach().to(local.count.dtype))

    def before(self, total: Tensor) -> Tensor:
        """Return the sum (b, W) over the tokens of earlier ranks, given that of this rank: one all-gather."""
        return self.collectives.all_gather(total)[: self.rank].sum(0)

    def around(self, total: Tensor, first_frame: Tensor, frame_length: int) -> tuple[Tensor, Tensor]:
        """Return what the frames of this rank miss: one all-gather of (2, b, W).

        Args:
            total: (b, W), sum over this rank's tokens.
            first_frame: (b, W), sum over those of them that are in the frame of the first.
            frame_length: Tokens of a frame.

        Returns:
            (b, W), sum over the tokens of earlier ranks, and (b, W), sum over those tokens of later ranks that
            continue this rank's last frame.
        """
        totals, first_frames = self.collectives.all_gather(torch.stack([total, first_frame])).unbind(1)
        last_frame = (self.stop - 1) // frame_length
        later = range(self.rank + 1, len(self.bounds) - 1)
        continuing = [r for r in later if self.bounds[r] // frame_length == last_frame]
        after = first_frames[self.rank + 1 : self.rank + 1 + len(continuing)].sum(0)
        return totals[: self.rank].sum(0), after


SplitTokens: TypeAlias = Callable[[int], TokenSplit]
"""Number of tokens of a sample -> its split."""


def runs_of_frames(start: int, num_tokens: int, frame_length: int) -> list[tuple[int, int, int]]:
    """Cut tokens, of which `start` is the number of the first, into runs (begin, end, number of frames).

    There are at most three: the rest of a frame, whole frames, the beginning of a frame. No tokens have no frames.
    """
    lead = min(-start % frame_length, num_tokens)
    num_whole = (num_tokens - lead) // frame_length  # torch.compile cannot trace divmod
    end = lead + num_whole * frame_length
    runs = [(0, lead, 1), (lead, end, num_whole), (end, num_tokens, 1)]
    return [run for run in runs if run[0] < run[1]] or [(0, 0, 0)]
