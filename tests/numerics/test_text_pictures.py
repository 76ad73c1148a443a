"""Pictures of a text against a reference that is written out picture by picture, without padding, with dense masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pomscale.base.condition import Text
from pomscale.distributed.activation_checkpointing import checkpoint_blocks
from pomscale.layers import sincos_positions_2d
from pomscale.models import DiPoM, VDiPoM, latent_tokens
from pomscale.models.block import Block
from pomscale.models.texts import JoinedTokens, put_before
from pomscale.models.video import VideoBlock
from pomscale.ops.pom import TokenSplit
from support.network_reference import feed_forward, linear, mix, moved, normed
from support.split_tokens import on_ranks
from support.tiny_clips import V2, awaken, normal, text_of, video_config
from support.tiny_text_pictures import WAYS, text_config

LENGTHS = [7, 1, 4]  # of the captions; one is as good as empty
BATCH, ROWS, COLUMNS = len(LENGTHS), 5, 3
ROTARY_ATTENTION = {"kind": "attention", "qk_norm": True, "rope": True}
JIT: dict[str, Any] = {
    "norm": "rms",
    "gates": "g",
    "ffn": "swiglu",
    "positions": "sincos_integer",
    "time_embedding": "data_fraction",
    "patch_embedding": {"bottleneck": 6},
}
TRUNKS: dict[str, dict[str, Any]] = {
    "pom": {"mixer": "pom"},
    "attention": {"mixer": "attention"},
    "hybrid": {"mixer": ["pom", "attention"]},
    "coefficients": {"mixer": V2},
    "JiT with PoM": {**JIT, "mixer": V2},
    "JiT with attention": {**JIT, "mixer": ROTARY_ATTENTION},
    "rotary positions alone": {"positions": "none", "mixer": [ROTARY_ATTENTION, V2]},
}

every_way = pytest.mark.parametrize("way", WAYS)
every_trunk = pytest.mark.parametrize("trunk", TRUNKS)


def build(way: str, trunk: str = "pom", dtype: torch.dtype = torch.float64, **fields: Any) -> DiPoM:
    model = DiPoM(text_config(**WAYS[way], **TRUNKS[trunk], **fields))
    awaken(model)
    return model.to(dtype)


def pictures(dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(BATCH, 3, 2 * ROWS, 2 * COLUMNS).to(dtype)


def times() -> Tensor:
    return torch.rand(BATCH, generator=torch.Generator().manual_seed(3))


def reference(model: DiPoM, latents: Tensor, t: Tensor, condition: Text) -> Tensor:
    captions = [row[mask].to(latents.dtype) for row, mask in zip(*condition, strict=True)]
    return torch.stack([reference_of_one(model, *sample) for sample in zip(latents, t, captions, strict=True)])


def reference_of_one(model: DiPoM, picture: Tensor, t: Tensor, caption: Tensor) -> Tensor:
    """picture (c H W), t (), caption (m text_dim), which begins at the position (0, 0) of the picture."""
    config = model.config
    x = model.patch_embedding(picture[None])[0]
    if config.positions != "none":
        integer = config.positions == "sincos_integer"
        x = x + sincos_positions_2d(ROWS, COLUMNS, config.dim, x.device, x.dtype, integer=integer)
    assert model.text_embedding is not None
    text, c = linear(model.text_embedding, caption), F.silu(model.time_embedding(t))
    positions = torch.tensor([(row, column) for row in range(ROWS) for column in range(COLUMNS)])
    for number, block in enumerate(model.trunk):
        if config.text == "in_context" and number == config.text_start:
            x, positions = torch.cat([text, x]), torch.cat([torch.zeros(len(text), 2).long(), positions])
        x = reference_block(block, x, c, text, positions)
    scale, shift = linear(model.modulation, c).chunk(2)
    x = normed(model.norm, x[-ROWS * COLUMNS :]) * (1 + scale) + shift
    patches = linear(model.head, x).view(ROWS, COLUMNS, 2, 2, 3)
    return patches.permute(4, 0, 2, 1, 3).reshape(3, 2 * ROWS, 2 * COLUMNS)


def reference_block(block: torch.nn.Module, x: Tensor, c: Tensor, text: Tensor, positions: Tensor) -> Tensor:
    assert isinstance(block, Block | VideoBlock)
    everything = torch.ones(len(x), len(x), dtype=torch.bool)
    if isinstance(block, Block):
        modulation, gates = linear(block.modulation, c).chunk(4), linear(block.gates, c).chunk(2)
        norms = (block.norm1, block.norm2)
    else:
        modulation, gates = linear(block.modulation, c).chunk(8), linear(block.gates, c).chunk(3)
        norms = (block.norm3, block.norm4)
        queries, context = moved(block.norm1, x, modulation, 0), moved(block.norm2, text, modulation, 2)
        read = mix(block.cross, queries, context, torch.ones(len(x), len(text), dtype=torch.bool))
        x = x + (block.gate_offset + gates[0]) * read
        modulation, gates = modulation[4:], gates[1:]
    tokens = moved(norms[0], x, modulation, 0)
    x = x + (block.gate_offset + gates[0]) * mix(block.mixer, tokens, tokens, everything, positions)
    return x + (block.gate_offset + gates[1]) * feed_forward(block.ffn, moved(norms[1], x, modulation, 2))


@every_way
@every_trunk
def test_outputs_and_every_gradient_are_those_of_the_reference(way: str, trunk: str) -> None:
    model, latents = build(way, trunk), pictures().requires_grad_()
    condition = Text(text_of(LENGTHS).embeddings.double().requires_grad_(), text_of(LENGTHS).mask)
    inputs = [latents, condition.embeddings, *model.parameters()]
    upstream = normal(*latents.shape, seed=4).double()
    found, expected = (
        [y, *torch.autograd.grad(y, inputs, upstream)]
        for y in (model(latents, times(), condition), reference(model, latents, times(), condition))
    )
    names = ["output", "latents", "text", *(name for name, _ in model.named_parameters())]
    for name, ours, theirs in zip(names, found, expected, strict=True):
        assert theirs.norm() > 0, name
        error = (ours - theirs).norm() / theirs.norm()
        assert error < 1e-11, (name, error)


@every_way
@every_trunk
def test_lower_precision_stays_close(way: str, trunk: str) -> None:
    condition = text_of(LENGTHS)
    exact = reference(build(way, trunk), pictures(), times(), condition)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        y = build(way, trunk, dtype)(pictures(), times(), condition)
        assert y.dtype == dtype
        assert ((y.double() - exact).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize("trunk", ["pom", "attention", "rotary positions alone"])
@every_way
def test_padding_of_the_text_changes_nothing(way: str, trunk: str) -> None:
    model = build(way, trunk)
    exact = model(pictures(), times(), text_of(LENGTHS))
    padded = model(pictures(), times(), text_of(LENGTHS, num_tokens=19))
    torch.testing.assert_close(padded, exact, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(model(pictures(), times(), text_of([6, 1, 4])), exact), "the last token of a text counts"


def test_with_cross_mixers_it_is_the_network_of_clips_of_one_frame() -> None:
    """Apart from the fixed positions, which clips have along three axes."""
    rope = {**V2, "rope": False}
    model = DiPoM(text_config(mixer=rope, positions="sincos"))
    video = VDiPoM(video_config(mixer=rope, latent_shape=(3, 1, 10, 6), patch_frames=1))
    awaken(model)
    weights = dict(model.state_dict())
    patches = weights["patch_embedding.projection.weight"]
    weights["patch_embedding.projection.weight"] = patches.view_as(video.patch_embedding.projection.weight)
    video.load_state_dict(weights)
    x, c, condition = normal(BATCH, ROWS * COLUMNS, 16), normal(BATCH, 1, 16), text_of(LENGTHS)
    text = normal(BATCH, max(LENGTHS), 16)
    for ours, theirs in zip(model.trunk, video.trunk, strict=True):
        assert torch.equal(ours(x, c, text, condition.mask), theirs(x, c, text, condition.mask))


@pytest.mark.parametrize("lengths", [[15], [4, 11], [6, 1, 8]])
@pytest.mark.parametrize("trunk", ["pom", "coefficients", "JiT with PoM"])
@every_way
def test_ranks_that_share_the_tokens_give_their_part_and_all_gradients(
    way: str, trunk: str, lengths: list[int]
) -> None:
    model, latents, condition = build(way, trunk), pictures(), text_of(LENGTHS)
    upstream = latent_tokens(model.config, normal(*latents.shape, seed=4).double())
    parameters = list(model.parameters())
    whole = latent_tokens(model.config, model(latents, times(), condition))
    expected = torch.autograd.grad(whole, parameters, upstream)

    def part(split: TokenSplit) -> Tensor:
        y: Tensor = model(latents, times(), condition, split_tokens=lambda _: split)
        return y

    parts, _ = on_ranks(lengths, part)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-11, atol=1e-12)
    found = torch.autograd.grad(torch.cat(parts, dim=1), parameters, upstream)
    for (name, _), ours, theirs in zip(model.named_parameters(), found, expected, strict=True):
        assert (ours - theirs).norm() < 1e-11 * theirs.norm(), name


def test_a_rank_without_the_tokens_in_context_has_gradients_of_zeros_for_them() -> None:
    """Otherwise the parameters that these come from would have a gradient on the first rank alone."""
    context, mask = normal(BATCH, 7, 16).requires_grad_(), text_of(LENGTHS).mask

    def joined(split: TokenSplit) -> JoinedTokens:
        return put_before(context, mask, normal(BATCH, split.stop - split.start, 16), None, split)

    (first, last), _ = on_ranks([8, 7], joined)
    assert first.split is not None
    assert first.split.bounds == (0, 15, 22)
    assert (first.x.shape[1], last.x.shape[1]) == (15, 7)
    (gradient,) = torch.autograd.grad(last.x.sum(), [context])
    assert not bool(gradient.any())


@pytest.mark.parametrize("trunk", ["hybrid", "JiT with attention"])
@every_way
def test_recomputation_dropout_and_alignment_change_no_digit(way: str, trunk: str) -> None:
    """Dropout by its seeds, with blocks run again, and the projections that the alignment loss takes."""
    fields = {"dropout": {"rate": 0.3}, "alignment": {"block": 2, "dim": 6, "hidden": 8}}
    model, again = build(way, trunk, **fields), build(way, trunk, **fields)
    checkpoint_blocks(again.blocks(), "full")
    inputs, seeds = (pictures(), times(), text_of(LENGTHS)), torch.tensor([3, 4, 5])
    results = [one(*inputs, dropout_seeds=seeds, num_aligned=2) for one in (model, again)]
    for y, projected in results:
        assert projected.shape == (2, ROWS * COLUMNS, 6)
        (y.sum() + projected.sum()).backward()
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.allclose(results[0][0], model(*inputs))
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert ours.grad is not None, name
        assert theirs.grad is not None, name
        assert torch.equal(ours.grad, theirs.grad), name


@pytest.mark.parametrize("way", ["cross", "in context, later"])
def test_samples_do_not_see_each_other_and_any_size_goes(way: str) -> None:
    model, condition = build(way), text_of(LENGTHS)
    together = model(pictures(), times(), condition)
    last = Text(condition.embeddings[2:], condition.mask[2:])
    torch.testing.assert_close(model(pictures()[2:], times()[2:], last), together[2:], rtol=1e-11, atol=1e-12)
    assert together.is_contiguous()
    assert not together._is_view(), "FSDP2 cannot hook a view"
    assert model(normal(BATCH, 3, 4, 14), times(), condition).shape == (BATCH, 3, 4, 14)


def test_the_other_kind_of_condition_is_refused() -> None:
    with pytest.raises(ValueError, match="takes texts, and not class ids"):
        build("cross")(pictures(), times(), torch.zeros(BATCH, dtype=torch.int64))
    of_classes = DiPoM(text_config(text_dim=None, num_classes=3))
    with pytest.raises(ValueError, match="takes class ids, and not texts"):
        of_classes(pictures(torch.float32), times(), text_of(LENGTHS))
    with pytest.raises(ValueError, match="the embedding of the empty caption"):
        build("cross").null_condition(2, "cpu")
