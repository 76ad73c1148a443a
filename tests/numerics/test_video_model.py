"""V-DiPoM against a reference that is written out sample by sample and frame group by frame group, with dense masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pomscale.base.condition import Text
from pomscale.layers import BottleneckPatchEmbedding, sincos_positions_3d
from pomscale.models import VDiPoM
from pomscale.models.video import VideoBlock
from support.network_reference import feed_forward, linear, mix, moved, normed
from support.tiny_clips import V2, awaken, normal, text_of, video_config

MIXERS: list[Any] = ["pom", "attention", ["pom", "attention"], V2, [{**V2, "heads": 1}, "attention"]]
MIXER_IDS = ["pom", "attention", "hybrid", "coefficients", "coefficients hybrid"]
LENGTHS = [7, 1, 4]  # of the captions; one is as good as empty
BATCH, GROUPS, ROWS, COLUMNS = len(LENGTHS), 3, 5, 3
START = torch.tensor([0, 4, 11])

every_mixer = pytest.mark.parametrize("mixer", MIXERS, ids=MIXER_IDS)
every_time = pytest.mark.parametrize("per_group", [False, True], ids=["one t", "t per group"])


def build(dtype: torch.dtype = torch.float64, **fields: Any) -> VDiPoM:
    model = VDiPoM(video_config(**fields))
    awaken(model)
    return model.to(dtype)


def clips(num_groups: int = GROUPS, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(BATCH, 3, 2 * num_groups, 2 * ROWS, 2 * COLUMNS).to(dtype)


def times(per_group: bool, num_groups: int = GROUPS) -> Tensor:
    t = torch.rand(BATCH, num_groups, generator=torch.Generator().manual_seed(3))
    return t if per_group else t[:, 0]


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(model: VDiPoM, latents: Tensor, t: Tensor, condition: Text, start: Tensor) -> Tensor:
    samples = []
    for i, clip in enumerate(latents):
        caption = condition.embeddings[i][condition.mask[i]].to(latents.dtype)  # no padding here, so no mask of it
        of_groups = t[i].expand(latents.shape[2] // model.config.patch_frames)
        samples.append(reference_of_one(model, clip, of_groups, caption, int(start[i])))
    return torch.stack(samples)


def reference_of_one(model: VDiPoM, clip: Tensor, t: Tensor, caption: Tensor, start: int) -> Tensor:
    """clip (c F H W), t (g,), caption (m text_dim)."""
    groups = [embed_group(model, clip, g, start) for g in range(len(t))]
    c = [F.silu(model.time_embedding(t[g])) for g in range(len(t))]
    text = linear(model.text_embedding, caption)
    for block in model.trunk:
        assert isinstance(block, VideoBlock)
        modulation = [linear(block.modulation, c_g).chunk(8) for c_g in c]
        gate = [linear(block.gates, c_g).chunk(3) for c_g in c]
        for g, x in enumerate(groups):
            queries = moved(block.norm1, x, modulation[g], 0)
            context = moved(block.norm2, text, modulation[g], 2)
            everything = torch.ones(len(queries), len(context), dtype=torch.bool)
            groups[g] = x + (block.gate_offset + gate[g][0]) * mix(block.cross, queries, context, everything)
        tokens = torch.cat([moved(block.norm3, x, modulation[g], 4) for g, x in enumerate(groups)])
        group_of = torch.arange(len(t)).repeat_interleave(len(groups[0]))
        readable = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
        if model.config.temporal == "block_causal":
            readable = group_of[:, None] >= group_of
        mixed = mix(block.mixer, tokens, tokens, readable, positions_of(len(t), start)).split(len(groups[0]))
        for g, x in enumerate(groups):
            y = x + (block.gate_offset + gate[g][1]) * mixed[g]
            fed = feed_forward(block.ffn, moved(block.norm4, y, modulation[g], 6))
            groups[g] = y + (block.gate_offset + gate[g][2]) * fed
    frames = []
    for g, x in enumerate(groups):
        scale, shift = linear(model.modulation, c[g]).chunk(2)
        patches = linear(model.head, normed(model.norm, x) * (1 + scale) + shift).view(ROWS, COLUMNS, 2, 2, 2, -1)
        frames.append(put_together(patches))
    return torch.cat(frames, dim=1)


def embed_group(model: VDiPoM, clip: Tensor, g: int, start: int) -> Tensor:
    embed = model.patch_embedding
    tokens = []
    for y in range(ROWS):
        for x in range(COLUMNS):
            patch = clip[:, 2 * g : 2 * g + 2, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            if isinstance(embed, BottleneckPatchEmbedding):
                tokens.append(linear(embed.expand, linear(embed.reduce, patch.permute(1, 2, 3, 0).flatten())))
            else:
                assert embed.projection.bias is not None
                tokens.append(embed.projection.weight.flatten(1) @ patch.flatten() + embed.projection.bias)
    if model.config.positions == "none":
        return torch.stack(tokens)
    number, integer = torch.tensor([[start + g]]), model.config.positions == "sincos_integer"
    sizes = (number, ROWS, COLUMNS, model.config.dim, clip.device, clip.dtype)
    return torch.stack(tokens) + sincos_positions_3d(*sizes, integer=integer)[0]


def put_together(patches: Tensor) -> Tensor:
    """(rows columns frame y x c) -> (c frames H W)."""
    out = patches.new_zeros(patches.shape[-1], 2, 2 * ROWS, 2 * COLUMNS)
    for y in range(ROWS):
        for x in range(COLUMNS):
            out[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = patches[y, x].permute(3, 0, 1, 2)
    return out


def positions_of(num_groups: int, start: int) -> Tensor:
    """(n 3): frame group from the beginning of the clip, row, column."""
    return torch.tensor([(start + g, y, x) for g in range(num_groups) for y in range(ROWS) for x in range(COLUMNS)])


@every_time
@pytest.mark.parametrize("temporal", ["none", "block_causal"])
@every_mixer
def test_outputs_and_every_gradient_are_those_of_the_reference(mixer: Any, temporal: str, per_group: bool) -> None:
    assert_is_reference(build(mixer=mixer, temporal=temporal), per_group)


JIT: dict[str, Any] = {
    "norm": "rms",
    "gates": "g",
    "ffn": "swiglu",
    "positions": "sincos_integer",
    "time_embedding": "data_fraction",
    "patch_embedding": {"bottleneck": 6},
}
ROTARY_ATTENTION = {"kind": "attention", "qk_norm": True, "rope": True}
CHOICES: dict[str, dict[str, Any]] = {
    "JiT with PoM": {**JIT, "mixer": V2},
    "JiT with attention": {**JIT, "mixer": ROTARY_ATTENTION},
    "rotary positions alone": {"positions": "none", "mixer": [ROTARY_ATTENTION, V2]},
}


@pytest.mark.parametrize(("temporal", "per_group"), [("none", False), ("block_causal", True)])
@pytest.mark.parametrize("choices", CHOICES)
def test_other_choices_of_the_trunk(choices: str, temporal: str, per_group: bool) -> None:
    assert_is_reference(build(**CHOICES[choices], temporal=temporal), per_group)


@every_time
@pytest.mark.parametrize("choices", CHOICES)
def test_frame_group_by_frame_group_is_the_whole_pass(choices: str, per_group: bool) -> None:
    """Each step, from the states of those before, with the positions of a clip that starts at frame group 2."""
    model, t, condition = build(**CHOICES[choices], temporal="block_causal"), times(per_group), text_of(LENGTHS)
    whole = model(clips(), t, condition, torch.full((BATCH,), 2)).split(2, dim=2)
    states = None
    for number, latents in enumerate(clips().split(2, dim=2)):
        y, states = model.step(latents, t[:, number] if per_group else t, condition, states, group=2 + number)
        torch.testing.assert_close(y, whole[number], rtol=1e-11, atol=1e-12)


def assert_is_reference(model: VDiPoM, per_group: bool) -> None:
    latents, t = clips().requires_grad_(), times(per_group)
    condition = Text(text_of(LENGTHS).embeddings.double().requires_grad_(), text_of(LENGTHS).mask)
    inputs = [latents, condition.embeddings, *model.parameters()]
    upstream = normal(*latents.shape, seed=4).double()
    found, expected = (
        [y, *torch.autograd.grad(y, inputs, upstream)]
        for y in (model(latents, t, condition, START), reference(model, latents, t, condition, START))
    )
    names = ["output", "latents", "text", *(name for name, _ in model.named_parameters())]
    for name, ours, theirs in zip(names, found, expected, strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert theirs.norm() > 0, name
        assert error < 1e-11, (name, float(error))


@every_time
@pytest.mark.parametrize("temporal", ["none", "block_causal"])
@every_mixer
def test_lower_precision_stays_close(mixer: Any, temporal: str, per_group: bool) -> None:
    t, condition = times(per_group), text_of(LENGTHS)
    exact = build(mixer=mixer, temporal=temporal)(clips(), t, condition)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        y = build(dtype, mixer=mixer, temporal=temporal)(clips(), t, condition)
        assert y.dtype == dtype
        assert ((y.double() - exact).norm() / exact.norm()).item() < tolerance


# --- what it reads, and what not -------------------------------------------------------------------------------------


@every_time
@every_mixer
def test_only_the_mask_keeps_the_future_from_the_past(mixer: Any, per_group: bool) -> None:
    t, condition = times(per_group), text_of(LENGTHS)
    changed = clips()
    changed[:, :, 2:4] += 1  # the second of three frame groups
    for temporal in ("block_causal", "none"):
        model = build(mixer=mixer, temporal=temporal)
        before, after = model(clips(), t, condition), model(changed, t, condition)
        moved_by = [(a - b).abs().max().item() for a, b in zip(before.split(2, 2), after.split(2, 2), strict=True)]
        assert min(moved_by[1:]) > 1e-6
        assert (moved_by[0] == 0) == (temporal == "block_causal"), moved_by


@pytest.mark.parametrize("mixer", ["pom", "attention"])
def test_a_later_time_reaches_no_earlier_frame_group(mixer: str) -> None:
    model, t = build(mixer=mixer, temporal="block_causal"), times(per_group=True)
    other = t.clone()
    other[:, 2] = 1 - other[:, 2]
    before, after = (model(clips(), one, text_of(LENGTHS)) for one in (t, other))
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.allclose(before[:, :, 4:], after[:, :, 4:])


@every_time
@every_mixer
def test_padding_of_the_text_changes_nothing(mixer: Any, per_group: bool) -> None:
    model, t = build(mixer=mixer), times(per_group)
    exact = model(clips(), t, text_of(LENGTHS))
    torch.testing.assert_close(model(clips(), t, text_of(LENGTHS, num_tokens=19)), exact, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(model(clips(), t, text_of([6, 1, 4])), exact), "the last token of a text counts"


@pytest.mark.parametrize("temporal", ["none", "block_causal"])
def test_equal_times_of_the_frame_groups_are_one_time(temporal: str) -> None:
    model, t = build(mixer=["pom", "attention"], temporal=temporal), times(per_group=False)
    one = model(clips(), t, text_of(LENGTHS), START)
    each = model(clips(), t[:, None].expand(-1, GROUPS), text_of(LENGTHS), START)
    torch.testing.assert_close(each, one, rtol=1e-11, atol=1e-12)


def test_a_picture_is_the_first_frame_of_a_causal_clip_where_a_frame_is_a_group() -> None:
    model = build(patch_frames=1, temporal="block_causal")
    t, condition = times(per_group=False), text_of(LENGTHS)
    picture = clips()[:, :, 0]
    y = model(picture, t, condition)
    torch.testing.assert_close(y, model(clips(), t, condition)[:, :, 0], rtol=1e-11, atol=1e-12)
    assert torch.equal(model(picture[:, :, None], t, condition), y[:, :, None])


def test_a_picture_is_a_clip_of_its_repeats_averaged() -> None:
    model, t, condition = build(), times(per_group=False), text_of(LENGTHS)
    picture = clips()[:, :, 0]
    repeated = picture[:, :, None].expand(-1, -1, 2, -1, -1)
    expected = model(repeated, t, condition).mean(2)
    assert not torch.allclose(model(repeated, t, condition)[:, :, 0], expected), "the two predictions differ"
    assert torch.equal(model(picture, t, condition), expected)
    assert torch.equal(model(picture[:, :, None], t, condition), expected[:, :, None])


def test_the_start_shifts_the_positions_and_nothing_else() -> None:
    """With the mask, a frame group that reads nothing before it, told to be number 1, is group 1 of nothing."""
    model, t, condition = build(temporal="block_causal"), times(per_group=False), text_of(LENGTHS)
    last = model(clips(), t, condition, START + 1)
    assert not torch.allclose(last, model(clips(), t, condition, START))
    assert torch.equal(
        model(clips(), t, condition), model(clips(), t, condition, torch.zeros(BATCH, dtype=torch.int64))
    )
    alone = model(clips()[:, :, :2], t, condition, START + 1)
    torch.testing.assert_close(last[:, :, :2], alone, rtol=1e-11, atol=1e-12)
    by_step, _ = model.step(clips()[:, :, :2], t, condition, None, group=5)
    five = model(clips()[:, :, :2], t, condition, torch.full((BATCH,), 5))
    torch.testing.assert_close(by_step, five, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("num_groups", "rows", "columns"), [(1, 5, 3), (4, 2, 7)])
def test_clips_of_other_sizes(num_groups: int, rows: int, columns: int) -> None:
    model = build(temporal="block_causal")
    latents = normal(BATCH, 3, 2 * num_groups, 2 * rows, 2 * columns).double()
    y = model(latents, times(True, num_groups), text_of(LENGTHS))
    assert y.shape == latents.shape
    assert y.is_contiguous()
    embeddings, mask = text_of(LENGTHS)
    alone = model(latents[1:2], times(True, num_groups)[1:2], Text(embeddings[1:2], mask[1:2]))
    torch.testing.assert_close(alone[0], y[1], rtol=1e-11, atol=1e-12)


def test_sizes_that_do_not_fit_are_refused() -> None:
    model, condition = build(temporal="block_causal"), text_of(LENGTHS)
    with pytest.raises(ValueError, match="2 times for 3 frame groups"):
        model(clips(), times(True, 2), condition)
    with pytest.raises(ValueError, match="5 latent frames cannot be cut into groups of 2"):
        model(clips()[:, :, :5], times(False), condition)
    with pytest.raises(ValueError, match="latents of 9x6 cannot be cut"):
        model(clips()[:, :, :, :9], times(False), condition)
    with pytest.raises(ValueError, match="takes one frame group of 2 frames, got 2"):
        model.step(clips()[:, :, :4], times(False), condition, None, group=0)
    with pytest.raises(ValueError, match="model reads all frames at once"):
        build(temporal="none").step(clips()[:, :, :2], times(False), condition, None, group=0)
