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
from torch import Tensor

from pomscale.distributed.world import World

# The operators below torch.distributed, which torch.compile traces. Of the functions around them torch 2.13 has renamed
# some; those that are differentiable are so in recent versions only.
_ops = torch.ops._c10d_functional


class _AllReduce(torch.autograd.Function):
    """Sum over ranks; the gradient of a rank's part is the sum of the gradients of all ranks' results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return _sum(gradients[0], ctx.group), None


def _sum(x: Tensor, group: str) -> Tensor:
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group))


class _AllGather(torch.autograd.Function):
    """Stack by rank; the gradient of a rank's part is the sum of the gradients of all ranks' copies of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous()[None], size, group))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        gradient = gradients[0].contiguous()
        reduced = _ops.reduce_scatter_tensor(gradient, "sum", ctx.size, ctx.group)
        return _ops.wait_tensor(reduced)[0], None, None


@dataclass(frozen=True)
class GroupCollectives:
    """Collectives (see ops.pom) of the `size` ranks of a process group, which is known by its name."""

    group: str
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> GroupCollectives:
        """Return those of a process group."""
        return cls(group.group_name, group.size())

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of the x of all ranks."""
        return _AllReduce.apply(x, self.group)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the x of all ranks, stacked."""
        return _AllGather.apply(x, self.group, self.size)


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
        return cls(size, world.rank % size, GroupCollectives.of(groups[world.rank // size]))
