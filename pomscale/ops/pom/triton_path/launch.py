"""Launches of the kernels: grids, block sizes, strides, and the tensors that they write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pomscale.ops.pom.rotary import frequencies, num_pairs
from pomscale.ops.pom.triton_path import kernels
from pomscale.ops.pom.triton_path.layout import Layout

# Two warps, each thread with 16 bytes of a token: the channels are cut finely enough that few tokens fill the machine,
# and an SM that holds 32 programs holds all of its 64 warps.
_WARPS = 2
_SUM_ROWS, _SUM_BLOCK = 16, 64


@dataclass(frozen=True)
class Polynomial:
    """The form as the kernels take it. width: W. axes: 0 = no rotation."""

    width: int
    degree: int
    is_product: bool
    axes: int

    @property
    def num_streams(self) -> int:
        """Channels that the algebra binds together; see `elements`."""
        if self.is_product:
            return self.degree
        return 2 if self.axes else 1

    @property
    def piece(self) -> int:
        return self.width // self.degree if self.is_product else self.width

    @property
    def pairs(self) -> list[int]:
        """Pairs of each of three axes; 0 beyond the last."""
        found = list(num_pairs(self.width, self.axes)) if self.axes else []
        return found + [0] * (3 - len(found))

    def block(self, dtype: torch.dtype) -> int:
        """Return the channels of a tile: 16 bytes of a token for each thread.

        Threads have fewer channels where they would keep more than 64 numbers from one token to the next (a sum and a
        value of each piece, or the coefficients), for these would not fit into the registers.
        """
        kept = self.num_streams * (2 if self.is_product else self.degree)
        channels = 16 // dtype.itemsize
        while channels > 1 and channels * kept > 64:
            channels //= 2
        return _WARPS * 32 * channels

    def tiles(self, block: int) -> int:
        if self.axes:
            return sum(-(-pairs // block) for pairs in self.pairs)
        return -(-self.piece // block)

    def aggregation_block(self, dtype: torch.dtype) -> int:
        """Return the channels of a tile of `kernels.aggregate`: with a rotation, two pairs for each thread."""
        return _WARPS * 32 * 2 if self.axes else self.block(dtype)

    def aggregation_options(self, dtype: torch.dtype) -> dict[str, int]:
        """Return what `kernels.aggregate` takes beside: tokens at a time, and how it is compiled.

        Pairs are loaded as 16 bytes for each thread. With 64 registers, half of an SM's threads can run at once. The
        limit is set at degree 4 alone, where the compiler would take more, or spill; elsewhere it would then take more.
        """
        tokens = 4 // dtype.itemsize if self.axes else 1
        return {"TOKENS": tokens} | ({"maxnreg": 64} if self.degree == 4 and not self.axes else {})

    def arguments(self, block: int, **constants: Any) -> dict[str, Any]:
        """Return what every kernel takes of the form."""
        pairs = self.pairs
        return {
            "width": self.width,
            "piece": self.piece,
            "tiles": self.tiles(block),
            **{f"pairs{axis}": pairs[axis] for axis in range(3)},
            "PRODUCT": self.is_product,
            "STREAMS": self.num_streams,
            "AXES": self.axes,
            "BLOCK": block,
            **constants,
        }


def rows(x: Tensor) -> Tensor:
    """Return x with contiguous channels, as the kernels need it; the other strides are free."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def run(kernel: Any, programs: int, **arguments: Any) -> None:
    """Run `programs` programs of a kernel on the device of its tensors, which need not be the current one."""
    if programs:
        with torch.cuda.device_of(next(x for x in arguments.values() if isinstance(x, Tensor))):
            kernel[(programs,)](**arguments, num_warps=_WARPS)


def operand(name: str, x: Tensor | None, absent: Tensor, *, batched: bool = True) -> dict[str, Any]:
    """Return the pointer and strides of (b n c), or of (n c) shared by all samples.

    The pointer of what is absent is never followed; `absent` stands in its place.
    """
    if x is None:
        return {name: absent, f"{name}_batch": 0, f"{name}_row": 0}
    x = rows(x)
    return {name: x, f"{name}_batch": x.stride(0) if x.dim() == 3 else 0, f"{name}_row": x.stride(-2)}


def turned(name: str, positions: Tensor | None, absent: Tensor) -> dict[str, Any]:
    """Return the pointer and strides of positions (b n axes) or (n axes)."""
    found = operand(name, positions, absent)
    stem = name.removesuffix("s")
    return {name: found[name], f"{stem}_batch": found[f"{name}_batch"], f"{stem}_row": found[f"{name}_row"]}


def angles(polynomial: Polynomial, absent: Tensor) -> Tensor:
    """Return the angle per unit of position (W/2,) fp32 of every pair."""
    if not polynomial.axes:
        return absent
    return _frequencies(polynomial.width, polynomial.axes, absent.device)


@lru_cache(maxsize=64)
def _frequencies(width: int, axes: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.cat(frequencies(width, axes, device))


def sum_of_items(partials: Tensor, layout: Layout) -> Tensor:
    """Return the sums (b groups W) of partials (b items W)."""
    batch, num_items, width = partials.shape
    sums = partials.new_empty(batch, layout.num_groups, width)
    tiles = -(-width // _SUM_BLOCK)
    run(
        kernels.sum_items,
        batch * layout.num_groups * tiles,
        partials=partials,
        group_items=layout.group_items,
        sums=sums,
        num_items=num_items,
        num_groups=layout.num_groups,
        width=width,
        tiles=tiles,
        ROWS=_SUM_ROWS,
        BLOCK=_SUM_BLOCK,
    )
    return sums


def running_sums(
    values: Tensor, layout: Layout, *, initial: Tensor | None = None, reverse: bool = False, exclusive: bool = False
) -> tuple[Tensor, Tensor]:
    """Return running sums (b rows W) of values within each segment, and what each segment comes to (b segments W)."""
    batch, num_rows, width = values.shape
    result, totals = torch.empty_like(values), values.new_empty(batch, layout.num_segments, width)
    tiles = -(-width // _SUM_BLOCK)
    run(
        kernels.running_sums,
        batch * layout.num_segments * tiles,
        values=values,
        initial=values if initial is None else initial,
        segment_rows=layout.segment_rows,
        result=result,
        totals=totals,
        num_rows=num_rows,
        num_segments=layout.num_segments,
        width=width,
        tiles=tiles,
        INITIAL=initial is not None,
        REVERSE=reverse,
        EXCLUSIVE=exclusive,
        ROWS=_SUM_ROWS,
        BLOCK=_SUM_BLOCK,
    )
    return result, totals
