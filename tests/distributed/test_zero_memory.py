"""The memory that `pomscale plan` predicts for DeepSpeed, against the storages of a real step."""

from __future__ import annotations

import pytest

from pomscale.benchmarks.plan import deepspeed_recipe, measure_deepspeed
from pomscale.plan.memory import step_memory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "offload"),
    [*(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((1, False), (1, True), (2, False))), (3, False)],
)
def test_memory_of_zero(stage: int, offload: bool) -> None:
    pytest.importorskip("deepspeed")
    peak, _ = measure_deepspeed(stage, "S", offload=offload)
    assert step_memory(deepspeed_recipe(stage, "S", offload=offload), 8).peak == pytest.approx(peak, rel=0.1)
