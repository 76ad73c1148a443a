"""Cost of V-DiPoM by formula, against the real modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pomscale.base.condition import Text
from pomscale.config.model import VideoModelConfig
from pomscale.config.presets import VIDEO_PRESETS
from pomscale.distributed.activation_checkpointing import checkpoint_blocks
from pomscale.layers import PoM
from pomscale.models import VDiPoM
from pomscale.ops.pom.whole import Memory
from pomscale.plan.model_cost import (
    TEXT_LENGTH,
    forward_flops,
    num_block_parameters,
    num_parameters,
    recomputed_flops,
    training_flops,
)
from support.tiny_clips import V2

TEXT_TOKENS = 7


def tiny(**fields: Any) -> VideoModelConfig:
    """3 frame groups of 12 tokens."""
    sizes = {"latent_shape": (3, 6, 6, 8), "text_dim": 20, "dim": 16, "depth": 2, "num_heads": 4}
    return VideoModelConfig.model_validate({"kind": "video", **sizes, **fields})


def preset(name: str, **fields: Any) -> VideoModelConfig:
    shape = {"latent_shape": (16, 20, 30, 48), "text_dim": 4096}
    return VideoModelConfig.model_validate({"preset": name, **VIDEO_PRESETS[name], **shape, **fields})


def on_meta(config: VideoModelConfig) -> VDiPoM:
    with torch.device("meta"):
        return VDiPoM(config)


def run(model: VDiPoM, num_times: int, *, batch: int = 1, text_length: int = TEXT_TOKENS) -> Tensor:
    """A forward pass, where the weights are."""
    config, device = model.config, model.head.weight.device
    mask = torch.ones(batch, text_length, dtype=torch.bool, device=device)
    text = Text(torch.ones(batch, text_length, config.text_dim, device=device), mask)
    t = torch.rand((batch,) if num_times == 1 else (batch, num_times), device=device)
    prediction: Tensor = model(torch.ones(batch, *config.latent_shape, device=device), t, text)
    return prediction


@pytest.mark.parametrize("name", VIDEO_PRESETS)
def test_parameter_formula_counts_the_module(name: str) -> None:
    config = preset(name)
    assert num_parameters(config) == sum(parameter.numel() for parameter in on_meta(config).parameters())


def test_xl_is_the_papers_size() -> None:
    """43 d^2 per block and its biases: 8 and 9 d of the mixers, 5 d of the feed-forward, 11 d of the modulation."""
    config = preset("vdipom-xl-2")
    d, values = config.dim, 2 * 2 * 2 * 16
    mixer = 12 * d**2 + 2 * 4 * d + d
    assert num_block_parameters(config) == 20 * (2 * mixer + 8 * d**2 + 5 * d + 11 * d**2 + 11 * d)
    root = (values + 1) * d + (4 * d**2 + 4 * d) + (4 * d**2 + d) + (4096 + 1) * d + 2 * (d**2 + d) + (d + 1) * values
    assert num_parameters(config) == num_block_parameters(config) + root == 1_160_387_840


MIXERS: dict[str, dict[str, Any]] = {
    "pom": {"mixer": "pom", "degree": 3, "expand": 1, "ffn_expansion": 3},
    "attention": {"mixer": "attention"},
    "hybrid": {"mixer": ["pom", "attention"], "patch_frames": 1},
    "heads": {"mixer": V2},
    "gate per channel": {"mixer": {**V2, "heads": 1, "groups": 1}},
    "JiT": {
        "mixer": [V2, {"kind": "attention", "heads": 2, "qk_norm": True, "rope": True}],
        "norm": "rms",
        "gates": "g",
        "ffn": "swiglu",
        "time_embedding": "data_fraction",
        "patch_embedding": {"bottleneck": 7},
    },
}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(("temporal", "per_group"), [("none", False), ("block_causal", False), ("block_causal", True)])
def test_flop_formula_counts_what_runs(mixer: str, temporal: str, per_group: bool) -> None:
    config = tiny(temporal=temporal, **MIXERS[mixer])
    num_times = config.num_groups if per_group else 1
    # The counter does not know the CPU's fused attention; the plain one is two products, which it does.
    model = VDiPoM(config)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model, num_times, batch=3)
    assert counter.get_total_flops() == 3 * forward_flops(config, text_length=TEXT_TOKENS, num_times=num_times)


@pytest.mark.parametrize("name", ["vdipom-xl-2", "vdit-xl-2"])
def test_flop_formula_counts_xl(name: str) -> None:
    config = preset(name)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        run(on_meta(config), 1, text_length=TEXT_LENGTH)
    assert counter.get_total_flops() == forward_flops(config)


@pytest.mark.parametrize("mode", ["none", "selective", "every-2", "full"])
@pytest.mark.parametrize("num_times", [1, 3])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_training_and_recomputation(mode: str, num_times: int, memory: Memory) -> None:
    """Nothing needs the gradient of latents, texts or time features, which is all that the formula adds."""
    config = tiny(mixer=["pom", "attention", V2, {**V2, "groups": 1, "heads": 1}], depth=4, temporal="block_causal")
    model = VDiPoM(config)
    checkpoint_blocks(model.blocks(), mode)
    for module in model.modules():
        if isinstance(module, PoM):
            module.mixer_memory = memory
    # Both passes: what runs again in the backward pass runs with its choice of attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(model, num_times).sum().backward()
    arguments = {"text_length": TEXT_TOKENS, "num_times": num_times}
    values = config.patch_frames * config.patch_size**2 * config.latent_shape[0]
    inputs = config.num_tokens * values + TEXT_TOKENS * config.text_dim + num_times * 4 * config.dim
    never_run = 2 * config.dim * inputs
    again = recomputed_flops(config, mode, lean=memory == "lean", **arguments)
    expected = training_flops(config, **arguments) + again - never_run
    assert counter.get_total_flops() == expected
