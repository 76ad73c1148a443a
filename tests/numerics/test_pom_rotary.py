"""Rotary positions against a restatement in plain loops, and the properties that make them positions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from pomscale.ops.pom import Context, Form, Queries, polynomial_mixer
from pomscale.ops.pom.rotary import cos_sin, num_pairs, rotate
from support.mixer_operands import BATCH, FORMS, QUERIES, TOKENS, operands, relative_error

Axes = Literal[1, 2, 3]
AXES: list[Axes] = [1, 2, 3]

# --- plain loops -----------------------------------------------------------------------------------------------------

# Pairs of (frame group, row, column), written down by hand: widths that three axes divide and widths that they do not,
# the presets' 12 and 16 heads, and the features of widths 384, 768, 1024 and 1152 at expand 2.
SPLITS = {
    6: (1, 1, 1),
    8: (2, 1, 1),
    10: (1, 2, 2),
    12: (2, 2, 2),
    14: (3, 2, 2),
    16: (2, 3, 3),
    20: (4, 3, 3),
    36: (6, 6, 6),
    48: (8, 8, 8),
    40: (6, 7, 7),
    768: (128, 128, 128),
    1536: (256, 256, 256),
    2048: (342, 341, 341),
    2304: (384, 384, 384),
}


def split_by_hand(width: int, num_axes: int) -> list[int]:
    return list(SPLITS[width]) if num_axes == 3 else [width // 2 // num_axes] * num_axes


def turned(vector: list[float], position: list[int], head_width: int | None = None) -> list[float]:
    """Turn one vector, pair by pair; head_width is that of the features where these are the gates of heads."""
    result, start = list(vector), 0
    for place, pairs in zip(position, split_by_hand(len(vector), len(position)), strict=True):
        for c in range(pairs):
            exponent = c / pairs
            if head_width is not None and len(position) == 1:
                # The frequency of channel c * (head_width // 2) of the features, whose pairs number S * head_width / 2.
                exponent = c * (head_width // 2) / (len(vector) * head_width // 2)
            angle = place * 10_000.0**-exponent
            x, y = vector[start + c], vector[start + c + pairs]
            result[start + c] = x * math.cos(angle) - y * math.sin(angle)
            result[start + c + pairs] = x * math.sin(angle) + y * math.cos(angle)
        start += 2 * pairs
    return result


def mixed_by_hand(
    u: list[list[float]],
    gate: list[list[float]],
    coefficients: list[list[float]],
    positions: tuple[list[list[int]], list[list[int]]],
    heads: int,
) -> list[list[float]]:
    """Return y of one sample without a mask, number by number; positions of context and queries."""
    width, features = len(u[0]), []
    for token, position in zip(u, positions[0], strict=True):
        v = [min(max(x if x > 0 else 0.01 * x, -0.1), 6.0) for x in token]
        h = [sum(c * x ** (m + 1) for m, c in enumerate(of_x)) for x, of_x in zip(v, coefficients, strict=True)]
        features.append(turned(h, position))
    mean = [sum(column) / len(u) for column in zip(*features, strict=True)]
    outputs = []
    for logits, position in zip(gate, positions[1], strict=True):
        s = [min(max(x / 6 + 0.5, 0.0), 1.0) for x in logits]
        s = turned(s, position, None if heads == 1 else width // heads)
        outputs.append([s[c if heads == 1 else c * heads // width] * mean[c] for c in range(width)])
    return outputs


HEADS = [(1, 12), (4, 12), (8, 40), (12, 36)]  # number, width of the features: heads of 3, 5 and 3 channels


@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize(
    ("num_axes", "heads", "width"),
    [*((axes, *heads) for axes in (1, 2) for heads in HEADS), (3, 1, 16), (3, 8, 40), (3, 12, 36), (3, 16, 48)],
)
def test_mixer_in_plain_loops(
    num_axes: Axes, heads: int, width: int, implementation: Literal["naive", "torch"]
) -> None:
    """Both paths take cosines in fp32, so that 1e-6 is what agrees."""
    form = Form("coefficients", 3, heads, num_axes)
    torch.manual_seed(heads)
    u, coefficients = 2 * torch.randn(1, 4, width).double(), torch.randn(width, 3).double()
    gate = 2 * torch.randn(1, 3, form.num_gates(width)).double()
    places, asking = torch.randint(0, 20, (4, num_axes)), torch.randint(0, 20, (3, num_axes))
    context, queries = Context(u, form, coefficients, places), Queries(gate, asking)
    y = polynomial_mixer(context, queries, implementation=implementation)
    expected = mixed_by_hand(
        u[0].tolist(), gate[0].tolist(), coefficients.tolist(), (places.tolist(), asking.tolist()), heads
    )
    assert relative_error(y[0], torch.tensor(expected, dtype=torch.float64)) < 2e-6


@pytest.mark.parametrize("largest", [1, 1000, 100_000, 2**24])
@pytest.mark.parametrize("num_axes", AXES)
def test_angles_at_large_positions(num_axes: Axes, largest: int) -> None:
    """An angle is a product in fp32: off by less than 2^-23 of itself, and a turn of a pair by as much."""
    vector = torch.randn(1, 1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    position = [largest - axis for axis in range(num_axes)]
    found = rotate(vector, cos_sin(torch.tensor([position]), 40, num_axes))
    expected = torch.tensor(turned(vector[0, 0].tolist(), position), dtype=torch.float64)
    assert float((found[0, 0] - expected).abs().max()) < 3e-7 + largest * 2.0**-22


def test_neighbours_far_away_are_told_apart_in_bf16() -> None:
    """Positions are integers and angles fp32, whatever the features are: 1000 and 1001 are one number in bf16."""
    x = torch.ones(1, 2, 8, dtype=torch.bfloat16)
    turns = rotate(x, cos_sin(torch.tensor([[1000], [1001]]), 8, 1))
    assert turns.dtype == torch.bfloat16
    assert bool((turns[0, 0, :1] != turns[0, 1, :1]).all())


# --- the split of channels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", SPLITS)
def test_split_of_three_axes_is_the_one_written_down(width: int) -> None:
    assert num_pairs(width, 3) == SPLITS[width]


def test_split_uses_every_channel_and_is_even_among_axes() -> None:
    for width in range(6, 400, 2):
        pairs = num_pairs(width, 3)
        assert 2 * sum(pairs) == width
        assert pairs[1] == pairs[2]
        assert max(pairs) - min(pairs) <= 1
        assert num_pairs(width, 1) == (width // 2,)
        if width % 4 == 0:
            assert num_pairs(width, 2) == (width // 4,) * 2


@pytest.mark.parametrize(
    ("width", "num_axes"), [(7, 1), (1, 1), (0, 1), (6, 2), (2, 2), (0, 2), (4, 3), (2, 3), (7, 3), (9, 3), (0, 3)]
)
def test_widths_without_a_split(width: int, num_axes: int) -> None:
    with pytest.raises(ValueError, match=f"rope={num_axes} needs .* of channels, got {width}"):
        num_pairs(width, num_axes)


# --- what makes them positions ---------------------------------------------------------------------------------------


def pair_sums(y: Tensor, num_axes: int) -> Tensor:
    """Return the sum over both channels of every pair."""
    sums, start = [], 0
    for pairs in split_by_hand(y.shape[-1], num_axes):
        sums.append(y[..., start : start + pairs] + y[..., start + pairs : start + 2 * pairs])
        start += 2 * pairs
    return torch.cat(sums, dim=-1)


@pytest.mark.parametrize("mask", [None, "causal"], ids=["none", "causal"])
@pytest.mark.parametrize("num_axes", AXES)
def test_pair_sums_depend_on_relative_positions_alone(num_axes: Axes, mask: Literal["causal"] | None) -> None:
    """Gates of channels: all positions move by one offset per axis; y itself changes."""
    name = {1: "coefficients-2-h1-r1", 2: "coefficients-5-h1-r2", 3: "coefficients-4-h1-r3"}[num_axes]
    context, queries = operands(FORMS[name], TOKENS, TOKENS)
    assert context.positions is not None
    moved = context.positions + torch.tensor([7, 300, 41][:num_axes])
    here = polynomial_mixer(context, queries, mask)
    there = polynomial_mixer(replace(context, positions=moved), replace(queries, positions=moved), mask)
    assert relative_error(pair_sums(there, num_axes), pair_sums(here, num_axes)) < 2e-5
    assert relative_error(there, here) > 0.1
    # What the queries alone move is no relative position.
    away = polynomial_mixer(context, replace(queries, positions=moved), mask)
    assert relative_error(pair_sums(away, num_axes), pair_sums(here, num_axes)) > 0.1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_axis_turns_channels_of_its_own(axis: int) -> None:
    x = torch.ones(1, 1, 40, dtype=torch.float64)
    position = torch.zeros(1, 3, dtype=torch.int64)
    position[0, axis] = 5
    changed = (rotate(x, cos_sin(position, 40, 3)) != 1)[0, 0].nonzero().flatten().tolist()
    ends = [0, 12, 26, 40]  # twice 6, 7 and 7 pairs
    assert changed == list(range(ends[axis], ends[axis + 1]))


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.rope is not None])
def test_position_zero_is_no_rotation(name: str) -> None:
    form = FORMS[name]
    context, queries = operands(form, QUERIES, TOKENS, output=True)
    assert context.positions is not None
    assert queries.positions is not None
    zeros = polynomial_mixer(
        replace(context, positions=torch.zeros_like(context.positions)),
        replace(queries, positions=torch.zeros_like(queries.positions)),
    )
    plain = replace(form, rope=None)
    without = polynomial_mixer(replace(context, form=plain, positions=None), replace(queries, positions=None))
    assert torch.equal(zeros, without)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_every_integer_type_means_the_same(dtype: torch.dtype) -> None:
    context, queries = operands(FORMS["coefficients-2-h8-r3"], QUERIES, TOKENS)
    assert context.positions is not None
    assert queries.positions is not None
    narrow = polynomial_mixer(
        replace(context, positions=context.positions.to(dtype)), replace(queries, positions=queries.positions.to(dtype))
    )
    assert torch.equal(narrow, polynomial_mixer(context, queries))


def test_positions_of_each_sample_are_its_own() -> None:
    context, queries = operands(FORMS["coefficients-3-h8-r1"], QUERIES, TOKENS, batched=True)
    together = polynomial_mixer(context, queries)
    for sample in range(BATCH):
        alone = polynomial_mixer(
            replace(context, u=context.u[sample, None], positions=context.positions[sample]),  # type: ignore[index]
            replace(queries, gate=queries.gate[sample, None], positions=queries.positions[sample]),  # type: ignore[index]
        )
        torch.testing.assert_close(alone[0], together[sample], rtol=1e-12, atol=1e-14)
