"""Networks: sizes and costs by formula against the real modules, initial weights, and what a fresh network does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pomscale.config.model import ImageModelConfig
from pomscale.config.presets import IMAGE_PRESETS
from pomscale.models import DiPoM, build_model, init_weights
from pomscale.models.block import Block
from pomscale.plan import forward_flops, num_parameters, training_flops

TINY: dict[str, Any] = {
    "latent_shape": (3, 8, 12),
    "num_classes": 10,
    "dim": 16,
    "depth": 2,
    "patch_size": 2,
    "num_heads": 4,
}
V2: dict[str, Any] = {"kind": "pom", "form": "coefficients", "heads": 4, "rope": True}
ROTARY_ATTENTION: dict[str, Any] = {"kind": "attention", "qk_norm": True, "rope": True}
JIT: dict[str, Any] = {
    "norm": "rms",
    "gates": "g",
    "ffn": "swiglu",
    "positions": "sincos_integer",
    "time_embedding": "data_fraction",
    "patch_embedding": {"bottleneck": 5},
    "in_context": {"tokens": 3, "start": 1},
}


def tiny(**fields: Any) -> ImageModelConfig:
    return ImageModelConfig(**{**TINY, **fields})


def preset(name: str, **fields: Any) -> ImageModelConfig:
    of_what = {"text_dim": 4096} if name.endswith("-text") else {"num_classes": 1000}
    return ImageModelConfig.model_validate({"preset": name, "latent_shape": (4, 32, 32), **of_what, **fields})


def build(config: ImageModelConfig, seed: int = 0) -> DiPoM:
    model = DiPoM(config)
    init_weights(model, seed)
    return model


def batch(config: ImageModelConfig, size: int = 2, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(size, *config.latent_shape, generator=generator).to(device)
    return latents, torch.rand(size, generator=generator).to(device), torch.arange(size, device=device)


def awaken(model: DiPoM) -> DiPoM:
    """Random weights everywhere: a fresh network is the identity and would hide errors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return model


# --- size and cost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGE_PRESETS)
def test_parameter_formula_counts_the_module(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = DiPoM(config)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "millions"), [("s", 44), ("b", 177), ("l", 566), ("xl", 833)])
def test_parameters_match_the_authors_table(name: str, millions: int) -> None:
    assert round(num_parameters(preset(f"dipom-{name}-2")) / 1e6) == millions


@pytest.mark.parametrize(
    ("name", "giga"), [("dipom-s-2", 16), ("dipom-b-2", 65), ("dipom-l-2", 207), ("dipom-xl-2", 305), ("dit-xl-2", 237)]
)
def test_flops_match_the_table(name: str, giga: int) -> None:
    assert abs(forward_flops(preset(name)) / 1e9 - giga) < 1


COUNTED = [
    tiny(mixer="pom", degree=3, expand=1, ffn_expansion=3),
    tiny(mixer="attention"),
    tiny(mixer=["pom", "attention"], patch_size=4),
    tiny(mixer={**V2, "degree": 3}),
    tiny(mixer=[{**V2, "heads": 1, "groups": 4}, {**V2, "groups": 2}]),
    tiny(mixer=V2, latent_shape=(3, 2, 2)),
    tiny(mixer=ROTARY_ATTENTION, **JIT),
    tiny(mixer=V2, **{**JIT, "positions": "none", "ffn_expansion": 5}),
]
COUNTED_IDS = ["pom", "attention", "hybrid", "heads", "groups", "one token", "JiT", "JiT with PoM"]


@pytest.mark.parametrize("config", COUNTED, ids=COUNTED_IDS)
def test_flop_formula_counts_what_runs(config: ImageModelConfig) -> None:
    model = DiPoM(config)
    # The counter does not know the CPU's fused attention; the plain one is two products, which it does.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*batch(config, size=3))
    assert counter.get_total_flops() == 3 * forward_flops(config)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "config",
    [tiny(mixer="pom"), tiny(mixer={**V2, "groups": 2}), tiny(mixer={**V2, "heads": 1}, **JIT)],
    ids=["product", "coefficients", "JiT"],
)
def test_training_costs_three_forward_passes_but_for_the_input(config: ImageModelConfig) -> None:
    """Nothing needs the gradient of the latents or of the time features, which is all that the formula adds."""
    with FlopCounterMode(display=False) as counter:
        DiPoM(config)(*batch(config, size=1)).sum().backward()
    patches = config.patch_size**2 * config.latent_shape[0]
    widths = (5, 256) if config.norm == "rms" else (config.dim, 4 * config.dim)
    never_run = 2 * (config.num_tokens * patches * widths[0] + config.dim * widths[1])
    assert training_flops(config) - counter.get_total_flops() == never_run


@pytest.mark.parametrize("name", ["dipom-xl-2", "dit-xl-2"])
def test_flop_formula_counts_xl(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = DiPoM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*batch(config, size=1, device="meta"))
    assert counter.get_total_flops() == forward_flops(config)


# --- initial weights -------------------------------------------------------------------------------------------------


def test_init_rules() -> None:
    model = build(tiny(dim=64, mixer=["pom", "attention"]))
    block = model.trunk[0]
    assert isinstance(block, Block)
    assert bool((block.gates.bias == -1).all())
    for zero in (block.gates.weight, block.modulation.weight, block.modulation.bias, block.ffn[0].bias):
        assert not bool(zero.any())
    for zero in (model.head.weight, model.head.bias, model.modulation.weight, model.modulation.bias):
        assert not bool(zero.any())
    assert model.class_embedding is not None
    for normal in (model.class_embedding, model.time_embedding.expand, model.time_embedding.contract):
        assert float(normal.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    convolution = model.patch_embedding.projection.weight
    fans = {block.ffn[0].weight: 64 + 128, block.mixer.gate.weight: 64 + 256, convolution: 4 * (3 + 64)}
    for weight, fan in fans.items():
        bound = (6 / fan) ** 0.5
        assert 0.9 * bound < float(weight.detach().abs().max()) <= bound


def test_init_does_not_depend_on_what_was_built_before_or_where() -> None:
    config = tiny(mixer=["pom", "attention"])
    expected = build(config, seed=3).state_dict()
    torch.manual_seed(99)
    with torch.device("meta"):
        deferred = DiPoM(config)
    deferred.to_empty(device="cpu")
    init_weights(deferred, 3)
    for name, value in deferred.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_init_depends_on_seed_and_name() -> None:
    first, second = build(tiny(), seed=0), build(tiny(), seed=1)
    assert not torch.equal(first.trunk[0].ffn[0].weight, second.trunk[0].ffn[0].weight)
    assert not torch.equal(first.trunk[0].ffn[0].weight, first.trunk[1].ffn[0].weight)


def test_deeper_models_share_the_weights_of_the_same_names() -> None:
    shallow, deep = build(tiny(depth=1)).state_dict(), build(tiny(depth=3)).state_dict()
    assert all(torch.equal(value, deep[name]) for name, value in shallow.items())


def test_public_build_model_is_initialised_and_takes_changes() -> None:
    model = build_model("dipom-s-2", num_classes=10, latent_shape=(4, 4, 4), depth=1, seed=3)
    expected = build(ImageModelConfig(preset="dipom-s-2", num_classes=10, latent_shape=(4, 4, 4), depth=1), seed=3)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_init_gives_assign_whole_fp32_parameters() -> None:
    model = DiPoM(tiny()).bfloat16()
    seen: list[torch.nn.Parameter] = []

    def assign(parameter: torch.nn.Parameter, value: Tensor) -> None:
        assert value.dtype == torch.float32
        assert value.shape == parameter.shape
        seen.append(parameter)

    init_weights(model, 0, assign)
    assert {id(parameter) for parameter in seen} == {id(parameter) for parameter in model.parameters()}


def test_init_refuses_parameters_without_a_rule() -> None:
    with pytest.raises(ValueError, match=r"norm\.weight"):
        init_weights(torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(4)}), 0)


# --- behaviour -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [{}, {"norm": "rms", "gates": "g", "ffn": "swiglu"}], ids=["DiPoM", "JiT"])
@pytest.mark.parametrize("mixer", ["pom", "attention", {**V2, "rope": False}])
def test_block_starts_as_the_identity(mixer: str, choices: dict[str, Any]) -> None:
    block = build(tiny(mixer=mixer, **choices)).blocks()[0]
    x, c = torch.randn(2, 5, 16), torch.randn(2, 1, 16)
    assert torch.equal(block(x, c), x)


def test_network_starts_with_zero_output() -> None:
    latents, t, condition = batch(tiny())
    assert not bool(build(tiny())(latents, t, condition).any())


@pytest.mark.parametrize(
    "choices",
    [{"mixer": "pom"}, {"mixer": "attention"}, {"mixer": V2}, {"mixer": ROTARY_ATTENTION, **JIT}],
    ids=["pom", "attention", "coefficients", "JiT"],
)
def test_output_has_the_shape_of_the_latents_and_depends_on_everything(choices: dict[str, Any]) -> None:
    config = tiny(**choices)
    model = awaken(DiPoM(config))
    latents, t, condition = batch(config)
    y = model(latents, t, condition)
    assert y.shape == latents.shape
    assert y.is_contiguous()
    assert not y._is_view(), "FSDP2 cannot hook a view"
    for changed in ((latents + 0.1, t, condition), (latents, t * 0.9, condition), (latents, t, condition + 1)):
        assert not torch.allclose(model(*changed), y)
    other_resolution = torch.randn(2, 3, 4, 20)
    assert model(other_resolution, t, condition).shape == other_resolution.shape


@pytest.mark.parametrize("mixer", [ROTARY_ATTENTION, V2], ids=["attention", "pom"])
def test_dropout_acts_in_its_blocks_and_in_training_alone(mixer: dict[str, Any]) -> None:
    config = tiny(mixer=mixer, depth=3, dropout={"rate": 0.5, "first": 1, "last": 1})
    model, plain = awaken(DiPoM(config)), awaken(DiPoM(tiny(mixer=mixer, depth=3)))
    assert model.state_dict().keys() == plain.state_dict().keys()
    inputs, seeds = batch(config), torch.tensor([3, 4])
    assert torch.equal(model(*inputs), plain(*inputs))
    y = model(*inputs, dropout_seeds=seeds)
    assert not torch.allclose(y, model(*inputs))
    assert torch.equal(y, model(*inputs, dropout_seeds=seeds))
    alone = model(*(value[1:] for value in inputs), dropout_seeds=seeds[1:])
    torch.testing.assert_close(alone, y[1:])
    x, c = torch.randn(2, 5, 16), torch.randn(2, 1, 16)
    positions = torch.zeros(5, 2, dtype=torch.int64)
    changed = [not torch.equal(block(x, c, positions, None, seeds), block(x, c, positions)) for block in model.blocks()]
    assert changed == [False, True, False]


def test_samples_do_not_see_each_other() -> None:
    model = awaken(DiPoM(tiny()))
    latents, t, condition = batch(tiny())
    together = model(latents, t, condition)
    torch.testing.assert_close(model(latents[1:], t[1:], condition[1:]), together[1:])


def test_null_condition_is_the_last_row() -> None:
    model = awaken(DiPoM(tiny()))
    null = model.null_condition(2, "cpu")
    assert null.tolist() == [10, 10]
    assert null.dtype == torch.int64
    latents, t, _ = batch(tiny())
    model(latents, t, null).sum().backward()
    assert model.class_embedding is not None
    gradient = model.class_embedding.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [10]


def test_bf16_weights_take_fp32_latents() -> None:
    model = awaken(DiPoM(tiny())).bfloat16()
    assert model(*batch(tiny())).dtype == torch.bfloat16


# --- the coefficient form --------------------------------------------------------------------------------------------


def test_init_rules_of_the_coefficient_form() -> None:
    mixer = build(tiny(dim=64, mixer={**V2, "groups": 4})).trunk[0].mixer
    assert mixer.coefficients.detach().abs().max() <= 0.001
    assert len(mixer.coefficients.detach().unique()) > 2
    assert not bool(mixer.gate.bias.any())
    for part in mixer.projection.weight.detach().chunk(4):
        bound = (6 / (16 + 32)) ** 0.5
        assert 0.9 * bound < float(part.abs().max()) <= bound
    assert mixer.output.bias is None


def test_init_rules_of_jit() -> None:
    model = build(tiny(dim=64, mixer=ROTARY_ATTENTION, **{**JIT, "in_context": {"tokens": 40, "start": 0}}))
    block = model.trunk[0]
    for zero in (block.gates.weight, block.gates.bias, block.modulation.weight, block.ffn.expand.bias):
        assert not bool(zero.any())
    for one in (block.norm1.weight, block.mixer.key_norm.weight, model.norm.weight):
        assert bool((one == 1).all())
    assert model.in_context is not None
    for normal in (model.in_context.positions, model.time_embedding.expand.weight):
        assert float(normal.detach().std()) == pytest.approx(0.02, rel=0.1)
    bound = (6 / (12 + 5)) ** 0.5  # a patch of 12 values to the bottleneck
    assert 0.9 * bound < float(model.patch_embedding.reduce.weight.detach().abs().max()) <= bound


def test_tokens_in_context_stand_at_the_origin_from_their_block_on() -> None:
    config = tiny(mixer=V2, depth=3, **JIT)
    model = awaken(DiPoM(config))
    seen: list[tuple[Tensor, ...]] = []
    for block in model.trunk:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    latents, t, condition = batch(config)
    model(latents, t, condition)
    assert [inputs[0].shape[1] for inputs in seen] == [24, 27, 27]
    assert seen[1][2][:3].tolist() == [[0, 0]] * 3
    assert torch.equal(seen[1][2][3:], seen[0][2])
    assert model.class_embedding is not None
    assert model.in_context is not None
    of_class = model.class_embedding(condition)
    assert torch.equal(seen[1][0][:, :3], model.in_context(of_class))


def test_tokens_have_their_row_and_column() -> None:
    """With rope what a token reads depends on where it is; a row of two tokens is no column of two tokens."""
    config = tiny(mixer=[{**V2, "heads": 8}, "attention"])
    model = awaken(DiPoM(config)).double()
    seen: list[Tensor] = []

    def look(block: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[2])

    model.trunk[0].register_forward_pre_hook(look)
    latents, t, condition = batch(config)
    model(latents.double(), t, condition)
    height, width = 4, 6
    assert seen[0].tolist() == [[row, column] for row in range(height) for column in range(width)]
    x, c = torch.randn(1, 2, 16, dtype=torch.float64), torch.randn(1, 1, 16, dtype=torch.float64)
    row, column = (model.trunk[0](x, c, torch.tensor(positions)) for positions in ([[0, 0], [0, 1]], [[0, 0], [1, 0]]))
    assert not torch.allclose(row, column)


def test_a_mixer_without_rope_gets_no_positions() -> None:
    config = tiny(mixer={**V2, "rope": False})
    blocks = awaken(DiPoM(config)).blocks()
    x, c = torch.randn(2, 5, 16), torch.randn(2, 1, 16)
    assert torch.equal(blocks[0](x, c), blocks[0](x, c, torch.zeros(5, 2, dtype=torch.int64)))


def test_public_build_model_takes_a_mixer() -> None:
    model = build_model(
        "dipom-s-2", num_classes=10, latent_shape=(4, 4, 4), depth=2, mixer=["pom", {**V2, "heads": 12, "degree": 3}]
    )
    first, second = (block.mixer for block in model.trunk)
    assert (first.form.name, second.form.name, second.form.degree, second.form.heads) == (
        "product",
        "coefficients",
        3,
        12,
    )
    assert tuple(second.coefficients.shape) == (768, 3)


def test_nominal_flops_of_the_authors_size() -> None:
    """Per token and block 4 d^2 of the mixer, 16 d of its gates and 8 d^2 of the feed-forward: 229 GFLOP in all."""
    config = preset("dipom-xl-2", ffn_expansion=4, mixer={**V2, "heads": 16})
    assert round(num_parameters(config) / 1e6) == 684
    assert round(forward_flops(config, nominal=True) / 1e9) == 229
    # Folded, the output map costs heads x d per token, and 2 d^2 once.
    saved = 28 * 2 * (256 * (2 * 1152**2 - 16 * 1152) - 2 * 1152**2)
    assert forward_flops(config, nominal=True) - forward_flops(config) == saved
