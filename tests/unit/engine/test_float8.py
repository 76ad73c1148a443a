"""Float8 linear maps, by the real torchao; on a CPU it emulates the arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pomscale.config.model import ImageModelConfig
from pomscale.models import DiPoM, init_weights

pytest.importorskip("torchao")

from pomscale.engine.float8 import to_float8

MODEL = ImageModelConfig(latent_shape=(4, 4, 4), num_classes=3, patch_size=1, dim=32, depth=2, num_heads=2)
V2: dict[str, Any] = {"kind": "pom", "form": "coefficients", "rope": True}


def network(*, float8: bool, seed: int = 0, mixer: Any = "pom") -> DiPoM:
    model = DiPoM(ImageModelConfig(**{**MODEL.model_dump(), "mixer": mixer}))
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # gates and head begin at zero, where nothing of a block would be seen
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    if float8:
        to_float8(model, torch.device("cpu"))
    return model


def loss_of(model: DiPoM) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x, target = torch.randn(2, 6, *MODEL.latent_shape, generator=generator)
    t, classes = torch.rand(6, generator=generator), torch.arange(6) % 4
    return (model(x, t, classes) - target).square().mean()


@pytest.mark.parametrize(
    "mixer",
    ["pom", {**V2, "heads": 16}, [{**V2, "heads": 4, "groups": 2}, V2]],
    ids=["product", "coefficients", "groups and channels"],
)
def test_loss_and_gradients_are_close_and_names_the_same(mixer: Any) -> None:
    plain, converted = network(float8=False, mixer=mixer), network(float8=True, mixer=mixer)
    ours, reference = dict(converted.named_parameters()), dict(plain.named_parameters())
    assert list(ours) == list(reference)
    assert all(ours[name].equal(reference[name]) for name in reference), "master weights have changed"
    assert converted.state_dict().keys() == plain.state_dict().keys()

    loss, expected = loss_of(converted), loss_of(plain)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    assert loss.item() != expected.item(), "nothing was computed in float8"
    loss.backward()
    expected.backward()
    for name, parameter in reference.items():
        gradient, exact = ours[name].grad, parameter.grad
        assert gradient is not None
        assert exact is not None
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.98, name


def test_only_maps_inside_blocks_whose_sizes_the_kernels_take_are_exchanged() -> None:
    converted = network(float8=True)
    kinds = {name: type(module).__name__ for name, module in converted.named_modules() if isinstance(module, nn.Linear)}
    exchanged = {name for name, kind in kinds.items() if kind != "Linear"}
    assert exchanged
    assert all(name.startswith("trunk.") for name in exchanged)
    odd = DiPoM(MODEL.model_copy(update={"dim": 36}))
    to_float8(odd, torch.device("cpu"))
    for module in odd.blocks().modules():
        if isinstance(module, nn.Linear):
            takes = module.in_features % 16 == 0 and module.out_features % 16 == 0
            assert (type(module) is not nn.Linear) == takes


def test_any_micro_batch_fits_the_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over a number of terms that is no multiple of 16 are padded, which the kernels of a GPU need.

    The CPU and the emulation do not need it. What is computed once per sample has a gradient that is a sum over the
    micro-batch.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    model = network(float8=False)
    to_float8(model, torch.device("cuda"))
    kernel, sizes = torch._scaled_mm, []

    def spied(a: Tensor, *others: Any, **options: Any) -> Tensor:
        sizes.append(a.shape[1])
        return kernel(a, *others, **options)

    monkeypatch.setattr(torch, "_scaled_mm", spied)
    x, c = torch.randn(6, 3, MODEL.dim), torch.randn(6, 1, MODEL.dim, requires_grad=True)
    model.blocks()[0](x, c).sum().backward()
    assert len(sizes) >= 3 * 4, "the products were made by something else"
    assert all(size % 16 == 0 for size in sizes)


def test_it_learns_as_fp32_does() -> None:
    curves = []
    for float8 in (False, True):
        model = network(float8=float8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        curve = []
        for _ in range(20):
            loss = loss_of(model)
            curve.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curves.append(curve)
    assert curves[0][-1] < 0.7 * curves[0][0], "nothing was learned"
    assert curves[1] == pytest.approx(curves[0], rel=3e-2)
