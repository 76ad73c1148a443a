"""Cost and memory of networks of pictures of a text, against the real modules and steps of the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pomscale.benchmarks.plan import measure, pretended_world
from pomscale.config.train import TrainRecipe
from pomscale.distributed.activation_checkpointing import checkpoint_blocks
from pomscale.layers import PoM
from pomscale.models import DiPoM
from pomscale.ops.pom.whole import Memory
from pomscale.plan.memory import step_memory
from pomscale.plan.model_cost import forward_flops, num_parameters, recomputed_flops, training_flops
from support.pairs import every_pair
from support.tiny_clips import V2, text_of
from support.tiny_plans import TINY_VIDEO_MODEL, tiny
from support.tiny_text_pictures import WAYS, text_config

TEXT_TOKENS = 7
MIXERS: dict[str, dict[str, Any]] = {
    "pom": {"mixer": "pom", "degree": 3, "expand": 1, "ffn_expansion": 3},
    "hybrid": {"mixer": ["pom", "attention"]},
    "heads": {"mixer": V2},
    "JiT": {
        "mixer": [{**V2, "groups": 1}, {"kind": "attention", "heads": 2, "qk_norm": True, "rope": True}],
        "norm": "rms",
        "gates": "g",
        "ffn": "swiglu",
        "time_embedding": "data_fraction",
        "patch_embedding": {"bottleneck": 7},
    },
}

every_way = pytest.mark.parametrize("way", WAYS)


def run(model: DiPoM) -> torch.Tensor:
    prediction: torch.Tensor = model(torch.ones(1, *model.config.latent_shape), torch.rand(1), text_of([TEXT_TOKENS]))
    return prediction


@every_way
@pytest.mark.parametrize("mixer", MIXERS)
def test_formulas_count_the_module_and_what_runs(mixer: str, way: str) -> None:
    config = text_config(**WAYS[way], **MIXERS[mixer])
    model = DiPoM(config)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    # The counter does not know the CPU's fused attention; the plain one is two products, which it does.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model)
    assert counter.get_total_flops() == forward_flops(config, text_length=TEXT_TOKENS)


@every_way
@pytest.mark.parametrize(("mode", "memory"), [("none", "lean"), ("selective", "fast"), ("every-2", "lean")])
def test_training_and_recomputation(way: str, mode: str, memory: Memory) -> None:
    """Nothing needs the gradient of latents, texts or time features, which is all that the formula adds."""
    config = text_config(**WAYS[way], mixer=["pom", "attention", V2, {**V2, "groups": 1, "heads": 1}], depth=4)
    model = DiPoM(config)
    checkpoint_blocks(model.blocks(), mode)
    for module in model.modules():
        if isinstance(module, PoM):
            module.mixer_memory = memory
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(model).sum().backward()
    inputs = config.num_tokens * 12 + TEXT_TOKENS * 8 + 4 * config.dim
    again = recomputed_flops(config, mode, lean=memory == "lean", text_length=TEXT_TOKENS)
    expected = training_flops(config, text_length=TEXT_TOKENS) + again - 2 * config.dim * inputs
    assert counter.get_total_flops() == expected


def recipe(way: str, mixer: Any, precision: str, mode: str) -> TrainRecipe:
    model = {**TINY_VIDEO_MODEL, "num_classes": None, **WAYS[way], "mixer": mixer}
    return tiny(model=model, compute={"precision": precision, "activation_checkpointing": mode})


MEMORY_MIXERS: dict[str, Any] = {
    "pom": "pom",
    "attention": "attention",
    "heads": {"kind": "pom", "form": "coefficients", "heads": 16, "rope": True},
}


@pytest.mark.parametrize(
    ("way", "mixer", "precision", "mode"),
    every_pair(["cross", "in context, later"], list(MEMORY_MIXERS), ["fp32", "bf16"], ["none", "full"]),
)
def test_memory_of_a_step(way: str, mixer: str, precision: str, mode: str) -> None:
    planned_for = recipe(way, MEMORY_MIXERS[mixer], precision, mode)
    with pretended_world(8) as world:
        peak, resident = measure(planned_for, world)
    planned = step_memory(planned_for, 8)
    assert planned.peak == pytest.approx(peak, rel=0.01), planned
    assert planned.peak - resident == pytest.approx(peak - resident, rel=0.02), planned
