"""FLOPs of the whole mixer for torch.utils.flop_counter: two per multiply-add of matrix products, as they are run.

The polynomial is elementwise and not counted. Output maps that are folded into the states of heads, and projections
that run again in the backward pass, are counted as they run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from pomscale.ops.pom.whole.function import OF_WEIGHTS, layout_of, restored

_Shape = Sequence[int]


@dataclass(frozen=True)
class _Products:
    """Multiply-adds of the maps; those of an output map that is applied to states are `of_states` and `of_heads`."""

    projection: int
    gate: int
    output: int
    of_states: int
    of_heads: int


def _products(
    x: _Shape, context: _Shape | None, weights: Sequence[_Shape], numbers: Sequence[Sequence[int]]
) -> _Products:
    form, order, segments = numbers
    layout = layout_of(x, context, order, segments)
    projection, _, gate, _, output, _, _ = (
        0 if shape is None else math.prod(shape) for shape in restored(weights, form[OF_WEIGHTS])
    )
    rows, read, heads = x[0] * x[1], x[0] * layout.num_context, form[2]
    if layout.folds(heads):
        d_out = weights[2 + form[OF_WEIGHTS][1] + form[OF_WEIGHTS][3]][0]
        return _Products(read * projection, rows * gate, 0, layout.num_states * output, rows * heads * d_out)
    return _Products(read * projection, rows * gate, rows * output, 0, 0)


@register_flop_formula(torch.ops.pomscale.mix)
def _forward(x: _Shape, context: _Shape | None, weights: Any, _i: Any, form: Any, *rest: Any, **_: Any) -> int:
    order, segments, *_keep = rest
    of = _products(x, context, weights, (form, order, segments))
    return 2 * (of.projection + of.gate + of.output + of.of_states + of.of_heads)


@register_flop_formula(torch.ops.pomscale.mix_backward)
def _backward(_dy: _Shape, tensors: Any, kept: Any, _i: Any, form: Any, *rest: Any, **_: Any) -> int:
    order, segments, needed = rest
    num_inputs = len(tensors) - sum(form[OF_WEIGHTS])
    context = tensors[1] if num_inputs == 2 else None
    of = _products(tensors[0], context, tensors[num_inputs:], (form, order, segments))
    flags = restored(needed[num_inputs:], form[OF_WEIGHTS])
    projection, gate, output = (bool(flag) for flag in flags[0:6:2])
    total = of.projection * (projection + needed[num_inputs - 1]) + of.gate * (gate + needed[0])
    total += of.output * (output + 1) + 2 * of.of_heads + of.of_states * (output + 2)
    if len(kept[0]) != 2:
        total += of.projection + of.gate
    return 2 * total
