"""Sequence parallelism: the tokens of a sample lie on `sp` ranks next to each other, which read the same samples.

    rank = data rank * sp + sequence rank

The ranks of one data rank exchange sums of tokens, two collectives per mixer and step whose bytes do not depend on the
tokens (`ops.pom.TokenSplit`). To the engines all ranks are alike: each computes a share of the loss and of every
gradient, and the sum over ranks is the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from pomscale.distributed.world import World


class _AllReduce(torch.autograd.Function):
    """Sum over ranks; the gradient of a rank's part is the sum of the gradients of all ranks' results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return funcol.wait_tensor(funcol.all_reduce(gradients[0].contiguous(), "sum", ctx.group)), None


class _AllGather(torch.autograd.Function):
    """Stack by rank; the gradient of a rank's part is the sum of the gradients of all ranks' copies of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return funcol.wait_tensor(funcol.all_gather_tensor(x.contiguous()[None], 0, group))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        reduced = funcol.reduce_scatter_tensor(gradients[0].contiguous(), "sum", 0, ctx.group)
        return funcol.wait_tensor(reduced)[0], None


@dataclass(frozen=True)
class GroupCollectives:
    """Collectives (see ops.pom) of the ranks of a process group."""

    group: dist.ProcessGroup

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of the x of all ranks."""
        return _AllReduce.apply(x, self.group)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the x of all ranks, stacked."""
        return _AllGather.apply(x, self.group)


@dataclass(frozen=True)
class SequenceRanks:
    """Group of the `size` ranks that hold the tokens of the same samples, and the rank of this process among them."""

    size: int
    rank: int
    collectives: GroupCollectives

    @classmethod
    def of(cls, world: World, size: int) -> SequenceRanks | None:
        """Return this rank's group of `size`, which divides the world; None for 1. A collective."""
        if size == 1:
            return None
        assert world.size % size == 0, "plan.checks.check_layout"
        # Every rank has to take part in making every group.
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world.size, size)]
        return cls(size, world.rank % size, GroupCollectives(groups[world.rank // size]))
