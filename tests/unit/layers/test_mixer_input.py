"""Sizes, tokens and states that do not fit a mixer end in one ValueError; so do those of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pomscale.layers import Attention, AttentionState, PoM
from pomscale.ops.pom import Segments

BATCH, TOKENS, DIM, HEADS = 2, 5, 16, 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim: expected a whole number of at least 1, got 0"),
        ({"dim": DIM, "degree": 0}, "degree: expected a whole number of at least 1, got 0"),
        ({"dim": DIM, "expand": 0}, "expand: expected a whole number of at least 1, got 0"),
        ({"dim": DIM, "expand": 1.5}, "expand: expected .* got 1.5"),
        ({"dim": DIM, "form": "coefficients", "groups": 0}, "groups: expected a whole number of at least 1, got 0"),
        ({"dim": DIM, "form": "coefficients", "groups": 3}, "groups: 3 do not divide 16 inputs and 32 outputs"),
        ({"dim": DIM, "groups": 2}, "groups must be 1 in the product form, got 2"),
        ({"dim": DIM, "form": "coefficients", "heads": 5}, "heads: 5 do not divide the 32 channels"),
        ({"dim": 5, "expand": 1, "form": "coefficients", "rope": 1}, "rope=1 needs an even number of channels, got 5"),
        ({"dim": 6, "expand": 1, "form": "coefficients", "rope": 2}, "rope=2 needs a multiple of 4 of channels, got 6"),
        ({"dim": 4, "expand": 1, "form": "coefficients", "rope": 3}, "even number of at least 6 of channels, got 4"),
        (
            {"dim": DIM, "form": "coefficients", "heads": 32, "rope": 1},
            "heads of at least 2 channels, got 32",
        ),
        ({"dim": DIM, "form": "coefficients", "heads": 2, "rope": 2}, "rope=2 needs a multiple of 4 of heads, got 2"),
        ({"dim": DIM, "form": "coefficients", "heads": 4, "rope": 3}, "even number of at least 6 of heads, got 4"),
    ],
)
def test_sizes_of_pom_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PoM(**arguments)


@pytest.mark.parametrize(
    ("dim", "heads", "message"),
    [(16, 5, "num_heads 5 does not divide dim 16"), (16, 0, "num_heads: expected .* got 0"), (0, 1, "dim: .* got 0")],
)
def test_sizes_of_attention_that_do_not_fit(dim: int, heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(dim, heads)


@pytest.fixture(params=["product", "coefficients", "attention"])
def mixer(request: pytest.FixtureRequest) -> PoM | Attention:
    return {
        "product": lambda: PoM(DIM),
        "coefficients": lambda: PoM(DIM, form="coefficients", heads=HEADS),
        "attention": lambda: Attention(DIM, HEADS),
    }[request.param]()


@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        ((BATCH, TOKENS, 8), None, r"x: expected shape \(b m 16\), got \(2, 5, 8\)"),
        ((TOKENS, DIM), None, r"x: expected shape \(b m 16\), got \(5, 16\)"),
        ((BATCH, TOKENS, DIM), (BATCH, 3, 8), r"context: expected shape \(b n 16\), got \(2, 3, 8\)"),
        ((BATCH, TOKENS, DIM), (1, 3, DIM), r"context: expected 2 samples as in x, got shape \(1, 3, 16\)"),
    ],
)
def test_tokens_that_do_not_fit(
    mixer: PoM | Attention, x: tuple[int, ...], context: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mixer(torch.zeros(x), None if context is None else torch.zeros(context))


def test_steps_that_do_not_fit(mixer: PoM | Attention) -> None:
    x = torch.zeros(BATCH, TOKENS, DIM)
    with pytest.raises(ValueError, match=r"x: expected shape .* got \(2, 5, 8\)"):
        mixer.step(x[..., :8])
    with pytest.raises(ValueError, match=r"step: mask must be .* got Segments"):
        mixer.step(x, None, Segments([TOKENS]))
    _, state = mixer.step(x)
    with pytest.raises(ValueError, match=r"expected a state .*\(1, .* got .*\(2, "):
        mixer.step(x[:1], state)  # type: ignore[arg-type]


def test_states_of_another_mixer(mixer: PoM | Attention) -> None:
    x = torch.zeros(BATCH, TOKENS, DIM)
    _, of_pom = PoM(DIM, 3).step(x)
    _, of_attention = Attention(DIM, 2).step(x)
    for state in (of_pom, of_attention):
        with pytest.raises(ValueError, match="step: expected a"):
            mixer.step(x, state)  # type: ignore[arg-type]


def test_attention_state_tells_the_shapes() -> None:
    key = torch.zeros(BATCH, HEADS, 7, DIM // HEADS)
    broken = AttentionState(key, key[:, :, :6], torch.ones(BATCH, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"key and value \(2, 4, 7, 4\) and takes_part \(2, 7\), got .*\(2, 4, 6, 4\)"):
        Attention(DIM, HEADS).step(torch.zeros(BATCH, TOKENS, DIM), broken)
