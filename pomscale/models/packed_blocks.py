"""Blocks on packed tokens: the equations of `Block` and `VideoBlock`, whose modules they use."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from pomscale.layers import Attention, PoM, gate_units, modulate_units
from pomscale.layers.mlp import Drop
from pomscale.models.packing import Packing

if TYPE_CHECKING:  # they call the functions here
    from pomscale.models.block import Block
    from pomscale.models.video import VideoBlock


def packed_block(
    block: Block, x: Tensor, c: Tensor, positions: Tensor | None, packing: Packing, seeds: Tensor | None
) -> Tensor:
    """Map packed tokens x (1 N d) with the conditions c (1 U d) of the units as `Block.forward` does."""
    c, times = F.silu(c), packing.times
    scale1, shift1, scale2, shift2 = block.modulation(c).chunk(4, dim=-1)
    gate1, gate2 = (block.gate_offset + block.gates(c)).chunk(2, dim=-1)
    mixed = packing.mix(block.mixer, modulate_units(block.norm1(x), shift1, scale1, times), positions)
    x = x + gate_units(gate1, _dropped(block, block.mixer, mixed, packing, seeds), times)
    del mixed  # free before the feed-forward, where it is not kept for the backward pass
    fed = block.ffn(modulate_units(block.norm2(x), shift2, scale2, times), _drop(block, packing, seeds))
    return x + gate_units(gate2, fed, times)


def packed_video_block(
    block: VideoBlock,
    x: Tensor,
    c: Tensor,
    text: Tensor,
    positions: Tensor | None,
    packing: Packing,
    seeds: Tensor | None,
) -> Tensor:
    """Map packed tokens x (1 N d) with c (1 U d) and the texts (1 M d) of the units as `VideoBlock.forward` does."""
    assert packing.texts is not None
    c, times = F.silu(c), packing.times
    of_queries, of_text, of_mixer, of_ffn = _pairs(block.modulation(c))
    gates = (block.gate_offset + block.gates(c)).chunk(3, dim=-1)
    queries = modulate_units(block.norm1(x), *of_queries, times)
    context = modulate_units(block.norm2(text), *of_text, packing.texts)
    read = block.cross(queries, context, packing.cross_mask)
    if isinstance(block.cross, Attention):
        read = packing.drop(block.dropout.cross, read, seeds)
    x = x + gate_units(gates[0], read, times)
    mixed = packing.mix(block.mixer, modulate_units(block.norm3(x), *of_mixer, times), positions)
    x = x + gate_units(gates[1], _dropped(block, block.mixer, mixed, packing, seeds), times)
    del read, mixed  # as in `packed_block`
    fed = block.ffn(modulate_units(block.norm4(x), *of_ffn, times), _drop(block, packing, seeds))
    return x + gate_units(gates[2], fed, times)


def _pairs(modulation: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return shift and scale of each of the four modulations of a `VideoBlock`, in the order of `modulate_units`."""
    scale1, shift1, scale2, shift2, scale3, shift3, scale4, shift4 = modulation.chunk(8, dim=-1)
    return [(shift1, scale1), (shift2, scale2), (shift3, scale3), (shift4, scale4)]


def _dropped(
    block: Block | VideoBlock, mixer: PoM | Attention, mixed: Tensor, packing: Packing, seeds: Tensor | None
) -> Tensor:
    return packing.drop(block.dropout.mixer, mixed, seeds) if isinstance(mixer, Attention) else mixed


def _drop(block: Block | VideoBlock, packing: Packing, seeds: Tensor | None) -> Drop | None:
    if seeds is None or block.dropout.hidden.rate == 0:
        return None
    return partial(packing.drop, block.dropout.hidden, seeds=seeds)
