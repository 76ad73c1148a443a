"""Held-out losses of both kinds: which samples, times and noise they are of, and that bad samples do not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pomscale.base.condition import Condition
from pomscale.base.keyed_random import Stream
from pomscale.config.train import ValidationConfig
from pomscale.diffusion.common_loss import COMMON_TIMES
from pomscale.diffusion.draws import keyed_normal
from pomscale.diffusion.objectives import Objective
from pomscale.distributed.world import join_world
from pomscale.evaluation.heldout import heldout_loss
from support.objectives import EXACT

NUM, BINS, SHAPE = 22, 4, (3, 2, 2)
CONFIG = ValidationConfig(path="", every_samples=1, num_samples=NUM, num_time_bins=BINS, batch=5)
DATA = torch.randn(NUM, *SHAPE, generator=torch.Generator().manual_seed(0))
BAD = 7


def read(indices: list[int]) -> tuple[Tensor, Condition, Tensor]:
    return DATA[indices], torch.tensor(indices), torch.tensor([float(index != BAD) for index in indices])


class Recorded:
    """A network that says one constant, and keeps the time at which it was asked of each sample."""

    def __init__(self) -> None:
        self.times: dict[int, list[float]] = {}
        self.seen: dict[int, list[Tensor]] = {}

    def __call__(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        for index, time, one in zip(condition.tolist(), t.tolist(), x, strict=True):
            self.times.setdefault(index, []).append(time)
            self.seen.setdefault(index, []).append(one)
        return torch.full_like(x, 0.5)


@pytest.mark.parametrize("objective", EXACT.values(), ids=EXACT)
def test_every_sample_has_its_bin_in_both_losses(objective: Objective) -> None:
    network = Recorded()
    with join_world("cpu") as world:
        found = heldout_loss(objective, network, read, [NUM], CONFIG, world)
    assert found.num_bad == 1
    eps = keyed_normal(CONFIG.seed, Stream.VALIDATION_NOISE, list(range(NUM)), SHAPE)
    own: list[list[float]] = [[] for _ in range(BINS)]
    common: list[list[float]] = [[] for _ in range(BINS)]
    first, last = COMMON_TIMES
    for index in range(NUM):
        number, (own_t, t) = index % BINS, (torch.tensor(time, dtype=torch.float64) for time in network.times[index])
        flow_t = objective.sigma(t) / (objective.alpha(t) + objective.sigma(t))
        assert number / BINS <= float(own_t) <= (number + 1) / BINS
        assert float(flow_t) == pytest.approx(first + (last - first) * float(own_t), rel=1e-5)
        for time, seen in zip((own_t, t), network.seen[index], strict=True):
            expected = objective.alpha(time) * DATA[index] + objective.sigma(time) * eps[index]
            torch.testing.assert_close(seen.double(), expected, rtol=1e-5, atol=1e-5)
        if index == BAD:
            continue
        said = torch.full(SHAPE, 0.5, dtype=torch.float64)
        scale = objective.error_scale(own_t)
        error = (said - objective.target(DATA[index], eps[index])) * (1 if scale is None else scale)
        x0, _ = objective.decompose(network.seen[index][1].double()[None], t, said[None])
        own[number].append(float(error.square().mean()))
        common[number].append(float(((x0[0] - DATA[index]) / flow_t).square().mean()))

    def means(losses: list[list[float]]) -> list[float]:
        return [sum(of_bin) / len(of_bin) for of_bin in losses]

    assert found.by_bin == pytest.approx(means(own), rel=1e-4)
    assert found.v_by_bin == pytest.approx(means(common), rel=1e-4)
    assert found.mean == pytest.approx(sum(map(sum, own)) / (NUM - 1), rel=1e-4)
    assert found.v_mean == pytest.approx(sum(map(sum, common)) / (NUM - 1), rel=1e-4)
