"""Every mode computes the same numbers; what runs again is counted in FLOPs, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pomscale.config.model import ImageModelConfig
from pomscale.distributed.activation_checkpointing import checkpoint_blocks, kept_operators
from pomscale.models import DiPoM
from pomscale.plan.model_cost import recomputed_flops, training_flops

MODES = ["full", "every-2", "every-3", "selective"]
MIXERS: list[Any] = ["pom", "attention", ["pom", "pom", "pom", "attention"]]


def config(mixer: Any, depth: int = 4) -> ImageModelConfig:
    return ImageModelConfig(latent_shape=(3, 8, 12), num_classes=10, dim=16, depth=depth, mixer=mixer, num_heads=4)


def model(of: ImageModelConfig, mode: str) -> DiPoM:
    built = DiPoM(of)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():  # everywhere: a fresh network is the identity and would hide errors
            parameter.normal_(0, 0.1, generator=generator)
    checkpoint_blocks(built.blocks(), mode)
    return built


def loss_and_gradients(built: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, t = torch.randn(2, 3, 8, 12, generator=generator), torch.rand(2, generator=generator)
    loss = built(latents, t, torch.tensor([3, 10])).square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in built.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("mixer", MIXERS, ids=["pom", "attention", "hybrid"])
@pytest.mark.parametrize("mode", MODES)
def test_loss_gradients_and_names_are_those_without(mixer: Any, mode: str) -> None:
    ours, expected = (loss_and_gradients(model(config(mixer), m)) for m in (mode, "none"))
    assert list(ours) == list(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mixer", MIXERS, ids=["pom", "attention", "hybrid"])
def test_recomputed_flops(mixer: Any) -> None:
    of = config(mixer)
    # Nothing needs the gradient of the latents or of the time features, which is all that the formula adds.
    never_run = 2 * 2 * of.dim * (of.num_tokens * of.patch_size**2 * 3 + 4 * of.dim)
    run = {}
    for mode in ("none", *MODES):
        # The counter does not know the CPU's fused attention; the plain one is two products, which it does.
        with sdpa_kernel(SDPBackend.MATH):
            run[mode] = _flops(model(of, mode))
        assert run[mode] == 2 * (training_flops(of) + recomputed_flops(of, mode)) - never_run, mode
    assert run["selective"] == run["none"] < run["every-3"]
    assert run["every-2"] < run["full"] < run["none"] * 4 / 3


def test_selective_keeps_matrix_products_and_attention_of_every_backend() -> None:
    assert {"aten.addmm", "aten.mm", "aten.bmm", "aten._scaled_dot_product_flash_attention"} <= set(kept_operators())


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_compiled_blocks_compile_and_recompute_the_same(mode: str) -> None:
    of = config(["pom", "attention"], depth=2)
    built = model(of, mode)
    torch._dynamo.reset()
    counters.clear()
    for block in built.blocks():
        block.compile(backend="aot_eager")  # all but the making of kernels, which takes a minute
    ours, expected = loss_and_gradients(built), loss_and_gradients(model(of, "none"))
    assert counters["stats"]["unique_graphs"] == 2  # and not run eagerly, as torch does with what it cannot look into
    assert list(ours) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)
    with sdpa_kernel(SDPBackend.MATH):
        again = [_flops(built), _flops(model(of, mode))]
    assert again[0] == again[1]


def _flops(built: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        loss_and_gradients(built)
    return counter.get_total_flops()
