"""A contiguous range of a flattened tensor, as ZeRO cuts parameters, that checkpoints like any other shard.

    shape (4, 3), range [2, 10):    . . a      a  box at (0, 2) of sizes (1, 1)
                                    b b b      b  box at (1, 0) of sizes (2, 3)
                                    b b b      c  box at (3, 0) of sizes (1, 1)
                                    c . .

torch.distributed.checkpoint knows boxes of global tensors, and any boxes load into any others. A row-major range is at
most 2 ndim - 1 boxes, each of them a view of the range's memory. So what is saved has the parameter's own name and
shape, and FSDP2's DTensors, other cuts and whole tensors load it, and the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor


class Box(NamedTuple):
    """Part of a global tensor: `view`, of shape `sizes`, begins at `offsets`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    view: Tensor


class FlatShard(torch.Tensor):
    """One rank's elements [start, start + values.numel()) of a row-major tensor of `shape`.

    `values` (1-D, contiguous, perhaps empty) is live: data that is loaded into the shard is written there. For the
    checkpoint planners a shard is a tensor of the global shape, with values' dtype and device; it computes nothing.
    """

    start: int
    values: Tensor  # type: ignore[assignment]  # torch's own `values` is for sparse tensors

    @staticmethod
    def __new__(cls, shape: Sequence[int], start: int, values: Tensor) -> FlatShard:
        assert values.ndim == 1
        assert values.is_contiguous()
        assert 0 <= start <= math.prod(shape) - values.numel()
        shard: FlatShard = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=values.dtype, device=values.device
        )
        shard.start = start
        shard.values = values.detach()
        return shard

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub forgets `func`
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise NotImplementedError(f"{func}: a FlatShard can only be saved from and loaded into; compute on its .values")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FlatShard(shape={tuple(self.shape)}, start={self.start}, values={self.values})"

    def on(self, values: Tensor) -> FlatShard:
        """Return the same range over another buffer."""
        assert values.shape == self.values.shape
        return FlatShard(self.shape, self.start, values)

    def boxes(self) -> list[Box]:
        """Return the boxes that tile the range, in memory order; none if it is empty."""
        stop = self.start + self.values.numel()
        return [
            Box(offsets, sizes, self.values[begin - self.start :][: math.prod(sizes)].view(sizes))
            for begin, offsets, sizes in _boxes(tuple(self.shape), self.start, stop)
        ]

    # Methods that torch.distributed.checkpoint asks of an object that is a part of a tensor (torch's _Checkpointable).

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self.boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        # By offset alone: the index's hint is a position among all ranks' chunks when saving, among ours when loading.
        return next(box.view for box in self.boxes() if box.offsets == tuple(index.offset or ()))


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Yield (first element, offsets, sizes) of boxes that tile [start, stop) of a row-major tensor of `shape`."""
    if start == stop:
        return
    if not shape:
        yield 0, (), ()
        return
    row = math.prod(shape[1:])
    first_whole, end_whole = -(-start // row), stop // row
    if first_whole > end_whole:  # within one row
        yield from _in_row(shape, end_whole, start, stop)
        return
    yield from _in_row(shape, first_whole - 1, start, first_whole * row)
    if first_whole < end_whole:
        yield first_whole * row, (first_whole, *(0 for _ in shape[1:])), (end_whole - first_whole, *shape[1:])
    yield from _in_row(shape, end_whole, end_whole * row, stop)


def _in_row(
    shape: tuple[int, ...], index: int, start: int, stop: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    begin = index * math.prod(shape[1:])
    for first, offsets, sizes in _boxes(shape[1:], start - begin, stop - begin):
        yield begin + first, (index, *offsets), (1, *sizes)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor or a FlatShard, live and without a graph; any other tensor as a whole."""
    if isinstance(tensor, FlatShard):
        return tensor.values
    tensor = tensor.detach()  # first: to_local() of a parameter would be part of the autograd graph
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
