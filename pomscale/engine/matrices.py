"""Matrices in a model's blocks, found by module and shape; where ranks hold them; and their way to one owner and back.

A linear map may stack several maps in its rows, as key and value, or the maps of the factors of a polynomial. The
module that slices the result says so in `stacked_maps`: name of a linear map below it -> number of equal parts. Each
part is a matrix of its own. A module that is no nn.Linear counts as a linear map if it is named there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from pomscale.engine.protocol import ShardableModel

Range = tuple[int, int]
"""Elements [start, stop) of a flattened parameter."""


def block_matrices(model: nn.Module) -> dict[str, int]:
    """Return the name of the weight of every linear map in the blocks -> number of matrices that its rows stack.

    Embeddings, heads, norms, biases and factors of single channels are none of them. Raises ValueError where a module
    stacks a number of maps that does not divide the rows.
    """
    shardable: ShardableModel = model  # type: ignore[assignment]  # nn.Module hides attributes from protocols
    inside = [module for block in shardable.blocks() for module in block.modules()]
    maps = {id(module): 1 for module in inside if isinstance(module, nn.Linear)}
    for module in inside:
        stacked: Mapping[str, int] = getattr(module, "stacked_maps", {})
        maps.update({id(module.get_submodule(child)): number for child, number in stacked.items()})
    found = {f"{name}.weight": maps[id(module)] for name, module in model.named_modules() if id(module) in maps}
    for name, number in found.items():
        num_rows = model.get_parameter(name).shape[0]
        if num_rows % number:
            raise ValueError(f"{name}: {number} maps cannot share {num_rows} rows")
    return found


@dataclass(frozen=True)
class Matrix:
    """A matrix (rows, columns) whose elements ranks share, in row-major order, one rank after the other.

    Attributes:
        tensor: the parameter, or the partition with parts of many parameters, that the optimiser steps on this rank.
        rows: number of outputs of the map.
        columns: number of inputs of the map.
        offset: first of this rank's elements in its flattened local part of `tensor`.
        counts: number of elements of each rank.
    """

    tensor: Tensor
    rows: int
    columns: int
    offset: int
    counts: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return self.rows * self.columns


def stacked_matrices(
    tensor: Tensor, shape: Sequence[int], number: int, ranges: Sequence[Range], rank: int, offset: int = 0
) -> Iterator[Matrix]:
    """Yield the `number` matrices that are stacked in the rows of a parameter of `shape`.

    Args:
        tensor: see Matrix.
        shape: shape of the whole parameter.
        number: number of matrices.
        ranges: elements of the parameter that each rank holds.
        rank: this rank, an index of `ranges`.
        offset: first of this rank's elements of the parameter in its flattened local part of `tensor`.
    """
    size = math.prod(shape) // number
    for first in range(0, number * size, size):
        parts = [(max(start, first), min(stop, first + size)) for start, stop in ranges]
        counts = tuple(max(stop - start, 0) for start, stop in parts)
        assert sum(counts) == size, "the ranks hold other elements than the matrix has"
        begin = max(first - ranges[rank][0], 0)
        yield Matrix(tensor, shape[0] // number, shape[1], offset + begin, counts)


def matrices_of(parameter: Tensor, number: int) -> Iterator[Matrix]:
    """Yield the matrices stacked in a parameter, whole or sharded by FSDP2 along its first axis."""
    shape, num_elements = tuple(parameter.shape), parameter.numel()
    if not isinstance(parameter, DTensor):
        yield from stacked_matrices(parameter, shape, number, [(0, num_elements)], 0)
        return
    mesh, axis = parameter.device_mesh, parameter.device_mesh.ndim - 1
    assert parameter.placements[axis] == Shard(0)
    of_rank = -(-shape[0] // mesh.size(axis)) * shape[1]
    bounds = [min(rank * of_rank, num_elements) for rank in range(mesh.size(axis) + 1)]
    ranges, rank = list(pairwise(bounds)), mesh.get_local_rank(axis)
    assert parameter.to_local().numel() == ranges[rank][1] - ranges[rank][0]
    yield from stacked_matrices(parameter, shape, number, ranges, rank)


@dataclass(frozen=True)
class MatrixRanks:
    """Ranks that share matrices and the work on them.

    Attributes:
        device: device of this rank's arithmetic and of its collectives.
        shards: group of the ranks that hold one copy of the parameters between them; None = this rank alone.
        copies: group of the ranks that hold the same part in each copy (HSDP); None = there is one copy.
    """

    device: torch.device
    shards: dist.ProcessGroup | None = None
    copies: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, parameter: Tensor) -> MatrixRanks:
        """Return the ranks that share a parameter, whole or sharded by FSDP2."""
        if not isinstance(parameter, DTensor):
            return cls(parameter.device)
        mesh = parameter.device_mesh
        # With offloading the parameter rests on the CPU, while collectives need the device of the mesh.
        device = (
            torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
        )
        groups = mesh.get_all_groups()
        return cls(device, groups[-1], groups[0] if mesh.ndim == 2 else None)

    @property
    def num_shards(self) -> int:
        return 1 if self.shards is None else self.shards.size()

    @property
    def shard(self) -> int:
        """Index of this rank in `shards`."""
        return 0 if self.shards is None else self.shards.rank()

    @property
    def num_copies(self) -> int:
        return 1 if self.copies is None else self.copies.size()

    @property
    def copy(self) -> int:
        """Index of the copy that this rank has a part of."""
        return 0 if self.copies is None else self.copies.rank()

    @property
    def size(self) -> int:
        return self.num_shards * self.num_copies

    def on_whole(self, matrices: Sequence[Matrix], parts: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function to whole matrices, of which each rank of this copy owns at most one: a collective of it.

        Args:
            matrices: at most `num_shards`; the one at index r is gathered, mapped and given back by rank r.
            parts: this rank's parts of all of them, flat, one after the other, on `device`.
            function: map of a matrix (rows, columns), which it may overwrite, to one of the same shape and dtype.

        Returns:
            This rank's parts of the results, laid out like `parts`.
        """
        shard = self.shard
        owned = matrices[shard] if shard < len(matrices) else None
        held = [matrix.counts[shard] for matrix in matrices] + [0] * (self.num_shards - len(matrices))
        gathered = [0] * self.num_shards if owned is None else list(owned.counts)
        whole = self._exchange(parts, held, gathered)
        if owned is not None:
            whole = function(whole.view(owned.rows, owned.columns)).contiguous().view(-1)
        return self._exchange(whole, gathered, held)

    def _exchange(self, sent: Tensor, num_sent: list[int], num_received: list[int]) -> Tensor:
        """Send num_sent[r] elements to each rank r, and return the num_received[r] from each, in rank order."""
        if self.num_shards == 1:
            return sent
        received = sent.new_empty(sum(num_received))
        dist.all_to_all_single(received, sent, num_received, num_sent, group=self.shards)
        return received

    def from_copy(self, copy: int, own: Tensor | None, num_elements: int, dtype: torch.dtype) -> Tensor:
        """Return what the ranks of a copy computed, on all copies; `own` is that of this copy. A collective."""
        if self.copies is None:
            assert own is not None
            return own
        theirs = own if copy == self.copy else None
        result = torch.empty(num_elements, dtype=dtype, device=self.device) if theirs is None else theirs
        dist.broadcast(result, group=self.copies, group_src=copy)
        return result
