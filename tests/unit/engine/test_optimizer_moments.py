"""AdamW with bf16 moments: rounded at random, so that small changes are not lost."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from pomscale.config.engine import OptimizerConfig
from pomscale.engine.adamw_bf16 import AdamWBf16, round_to_bf16
from pomscale.engine.optimizers import build_optimizer

NUM_STEPS = 200


@pytest.mark.parametrize("value", [1.001, -1.001, 3e-12, -7.3e8, 1.0, 0.0])
def test_rounding_is_to_a_neighbour_and_right_on_average(value: float) -> None:
    x = torch.full((200_000,), value)
    rounded = round_to_bf16(x, torch.Generator().manual_seed(0))
    exact = x[0].double().item()
    neighbours = sorted({float(n) for n in rounded.unique()})
    gap = abs(exact) * 2**-7  # bf16 has 8 digits
    assert all(abs(neighbour - exact) <= gap for neighbour in neighbours)
    assert len(neighbours) == (1 if x[0].bfloat16() == x[0] else 2)
    # The mean of n draws that are at most a gap apart is within 5 standard deviations, gap / (2 sqrt(n)), of the value.
    assert rounded.double().mean().item() == pytest.approx(exact, abs=5 * gap / 2 / len(x) ** 0.5)


def test_the_second_moment_moves_where_rounding_to_nearest_would_stall() -> None:
    """At beta2 = 0.999 a step changes v by less than half a digit of bf16."""
    weights, nearest = nn.Parameter(torch.zeros(1000)), torch.full((1000,), 1.0).bfloat16()
    optimizer = AdamWBf16([weights], lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    optimizer.state[weights] = {
        "step": torch.zeros(()),
        "exp_avg": torch.zeros(1000).bfloat16(),
        "exp_avg_sq": torch.full((1000,), 1.0).bfloat16(),
    }
    for _ in range(NUM_STEPS):
        weights.grad = torch.full((1000,), 0.1)
        optimizer.step()
        nearest = (nearest.float() * 0.999 + 0.001 * 0.1**2).bfloat16()
    exact = 0.01 + 0.99 * 0.999**NUM_STEPS
    assert nearest.unique().tolist() == [1.0]
    assert optimizer.state[weights]["exp_avg_sq"].float().mean().item() == pytest.approx(exact, rel=2e-3)


def descend(moments: Literal["fp32", "bf16"]) -> tuple[list[float], Tensor, Tensor]:
    """Losses of a small regression, and its weights before and after."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(256, 16, generator=generator), torch.randn(256, 4, generator=generator)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    before = flat(model)
    optimizer = build_optimizer(model, OptimizerConfig(lr=3e-3, weight_decay=0.1, moments=moments))
    losses = []
    for _ in range(NUM_STEPS):
        loss = (model(inputs) - targets).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    dtype = torch.bfloat16 if moments == "bf16" else torch.float32
    assert {state[name].dtype for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")} == {dtype}
    return losses, before, flat(model)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_it_follows_adamw_with_fp32_moments() -> None:
    """Weight decay, bias correction and all; and the same again when it is run again."""
    ours, _, our_weights = descend("bf16")
    theirs, start, their_weights = descend("fp32")
    assert theirs[-1] < 0.7 * theirs[0], "nothing was learned"
    assert ours == pytest.approx(theirs, rel=2e-3)
    assert (our_weights - their_weights).norm() < 0.02 * (their_weights - start).norm()
    assert descend("bf16")[0] == ours
