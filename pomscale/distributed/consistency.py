"""Check that ranks which hold copies of a tensor hold the same one, to the bit.

Replicas compute the same update from the same reduced gradient, so they never differ, unless a device computes wrongly
or memory flips a bit. Nothing else would show that: the loss is a mean over models that drift apart.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from pomscale.base.errors import PomscaleError
from pomscale.distributed.flat_shard import local_part
from pomscale.distributed.world import World

_CHUNK = 1 << 22  # elements: checksums need 16 bytes for each
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio (Knuth, volume 3, section 6.4), as an int64


def check_replicas(world: World, group: dist.ProcessGroup, tensors: Mapping[str, Tensor]) -> None:
    """Compare the copies of `tensors` within each group. A collective of the world, in which every rank has a group.

    Args:
        world: all ranks.
        group: the ranks that hold copies of this rank's `tensors`.
        tensors: tensors by name, in the same order on all ranks of the group; of DTensors and FlatShards the local
            data is compared.

    Raises:
        PomscaleError: on all ranks of the world, if ranks of one group hold different bits.
    """
    problems = [problem for problem in world.gather(_difference(group, tensors)) if problem is not None]
    if problems:
        raise PomscaleError(
            f"{problems[0]}: a device computes wrongly or its memory is damaged. Exclude that host and run the same "
            "command again, it goes on from the last checkpoint; verify what was saved since the last check"
        )


def _difference(group: dist.ProcessGroup, tensors: Mapping[str, Tensor]) -> str | None:
    """Return what the replicas of a group differ in, the same on all of its ranks; None if they are equal."""
    mine = torch.stack([checksum(local_part(tensor)) for tensor in tensors.values()])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    replicas = [tuple(checksums.tolist()) for checksums in gathered]
    if len(set(replicas)) == 1:
        return None
    hosts: list[str] = [""] * len(replicas)
    dist.all_gather_object(hosts, socket.gethostname(), group=group)
    names = [f"{dist.get_global_rank(group, i)} ({host})" for i, host in enumerate(hosts)]
    common, count = Counter(replicas).most_common(1)[0]
    first = next(name for name, *sums in zip(tensors, *replicas, strict=True) if len(set(sums)) > 1)
    if 2 * count > len(replicas):
        odd = [name for name, replica in zip(names, replicas, strict=True) if replica != common]
        return f"rank {', '.join(odd)}: its copy of {first} is not that of the {count} other ranks"
    return f"ranks {', '.join(names)}: their copies of {first} differ, and no majority tells which are wrong"


def checksum(tensor: Tensor) -> Tensor:
    """Return a checksum of the bits of a tensor and their positions, as an int64 scalar on its device.

    Each element's bits, as an integer plus one, are multiplied by a scrambled odd number of its position, and summed
    modulo 2^64. One changed element always changes the sum, since odd numbers have inverses; several do but for a
    chance of about 2^-32.
    """
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, bits.numel(), _CHUNK):
        part = bits[begin : begin + _CHUNK].to(torch.int64)
        positions = torch.arange(begin, begin + part.numel(), device=tensor.device) * _ODD
        total += ((part + 1) * (positions ^ (positions >> 32) | 1)).sum()
    return total
