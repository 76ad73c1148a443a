"""Copy of the training state in host memory, so that it can be written while training changes it.

The cost is in allocating: fresh memory is given page by page, and pinning it takes longer than filling it. So the
memory is allocated at the first save and used again by all later ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from pomscale.distributed.flat_shard import FlatShard, local_part

# Pinned memory comes in powers of two: pieces of this size lose little to rounding, and need few calls.
_PIECE_BYTES = 1 << 28
_ALIGNMENT = 64


def leaves(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of nested dicts; a name joins the keys with dots, as in torch.distributed.checkpoint."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class HostCopy:
    """Copy of this rank's part of one state, in memory that is allocated once."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return copies by name, which overwrite those of the last call; of a DTensor this rank's part is copied.

        Of a FlatShard the copy is one of the same range. Returns when the state may change again. Memory is allocated
        again only when names, shapes or dtypes have changed.
        """
        live = dict(leaves(state))
        with torch.no_grad():
            parts = {name: local_part(leaf) for name, leaf in live.items()}
        if _layout(parts) != _layout(self._buffers):
            self._buffers = {}  # given back first: two copies may not fit
            self._buffers = dict(zip(parts, _allocate(list(parts.values())), strict=True))
        if parts:
            torch._foreach_copy_(list(self._buffers.values()), list(parts.values()), non_blocking=True)
        if any(part.is_cuda for part in parts.values()):
            torch.cuda.current_stream().synchronize()
        return {
            name: leaf.on(self._buffers[name]) if isinstance(leaf, FlatShard) else self._buffers[name]
            for name, leaf in live.items()
        }


class CopyPlanner(DefaultSavePlanner):
    """Planner that plans from names and shapes of the live state, and writes from copies of its tensors."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the data of one item of the plan (a hook of torch)."""
        copy = self._copies[index.fqn]
        return copy.__get_tensor_shard__(index) if isinstance(copy, FlatShard) else copy


def _layout(tensors: Mapping[str, Tensor]) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]


def _allocate(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return uninitialised host tensors like `parts`, pinned if any of those is on a GPU.

    Each has a storage of its own extent, though it lies in a larger piece of memory: torch.save writes whole storages.
    """
    pin = any(part.is_cuda for part in parts)
    buffers: list[Tensor] = []
    while len(buffers) < len(parts):
        rest = parts[len(buffers) :]
        ends = list(accumulate(-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in rest))
        num = max(sum(end <= _PIECE_BYTES for end in ends), 1)
        piece = torch.empty(ends[num - 1], dtype=torch.uint8, pin_memory=pin).numpy()
        for part, end in zip(rest[:num], [0, *ends], strict=False):
            own = torch.from_numpy(piece[end : end + part.nbytes])
            buffers.append(own.view(part.dtype).view(part.shape))
    return buffers
