"""Sequence parallelism in process: ranks that hold some of the tokens give what one gives that holds all of them.

Real ranks: tests/distributed/test_sequence_parallel.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pomscale.base.condition import Text
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.layers import Attention, PoM
from pomscale.models import latent_tokens, make_model
from pomscale.ops.pom import BlockCausal, Context, Form, Mask, Queries, Segments, TokenSplit, polynomial_mixer
from support.pairs import every_pair
from support.split_tokens import Meeting, ThreadCollectives, on_ranks

BATCH, WIDTH, DIM = 2, 12, 8
FORMS = {
    "product": Form(degree=3),
    "coefficients": Form("coefficients", degree=2),
    "rope": Form("coefficients", degree=3, rope=1),
    "heads": Form("coefficients", degree=2, heads=4, rope=2),
}
SPLITS = [[13, 10], [9, 2, 11, 1], [1, 1, 1], [8, 8, 7]]
MASKS: dict[str, Mask] = {"none": None, "causal": "causal"} | {
    f"frames of {length}": BlockCausal(length) for length in (1, 4, 5, 7, 50)
}


def operands(num_tokens: int, form: Form, seed: int = 0) -> dict[str, Tensor]:
    """Leaves in float64, and positions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    leaves = {"u": normal(BATCH, num_tokens, WIDTH), "gate": normal(BATCH, num_tokens, form.num_gates(WIDTH))}
    if form.name == "coefficients":
        leaves["coefficients"] = normal(WIDTH, form.degree)
    if form.heads > 1:
        leaves["output"] = normal(DIM, WIDTH)
    if form.rope is not None:
        leaves["positions"] = torch.randint(0, 50, (num_tokens, form.rope), generator=generator)
    return leaves


def mix(form: Form, leaves: dict[str, Tensor], mask: Mask, split: TokenSplit | None = None) -> Tensor:
    tokens = slice(None) if split is None else split.tokens
    positions = leaves["positions"][tokens] if form.rope else None
    if isinstance(mask, Tensor):
        mask = mask[:, tokens]
    return polynomial_mixer(
        Context(leaves["u"][:, tokens], form, leaves.get("coefficients"), positions),
        Queries(leaves["gate"][:, tokens], positions, leaves.get("output")),
        mask,
        split=split,
        implementation="torch" if split is not None else "naive",
    )


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return list(torch.autograd.grad((y * weights).sum(), leaves))


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-11, atol=1e-11 * their.abs().max().item())


@pytest.mark.parametrize(("form", "mask", "lengths"), every_pair(FORMS, MASKS, SPLITS))
def test_split_operator_equals_the_oracle(form: Form, mask: Mask, lengths: list[int]) -> None:
    leaves = operands(sum(lengths), form)
    differentiated = [leaf for leaf in leaves.values() if leaf.requires_grad]
    parts, _ = on_ranks(lengths, lambda split: mix(form, leaves, mask, split))
    ours, theirs = torch.cat(parts, dim=1), mix(form, leaves, mask)
    assert_equal([ours, *gradients(ours, differentiated)], [theirs, *gradients(theirs, differentiated)])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_padding_counts_the_tokens_of_all_ranks(form: Form) -> None:
    """Rank 1 has none that takes part in the first sample, and the second sample has none at all."""
    lengths = [9, 2, 12]
    leaves = operands(sum(lengths), form)
    differentiated = [leaf for leaf in leaves.values() if leaf.requires_grad]
    mask = torch.rand(BATCH, sum(lengths), generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, 9:11], mask[1] = False, False
    parts, _ = on_ranks(lengths, lambda split: mix(form, leaves, mask, split))
    ours, theirs = torch.cat(parts, dim=1), mix(form, leaves, mask)
    assert_equal([ours, *gradients(ours, differentiated)], [theirs, *gradients(theirs, differentiated)])
    assert not ours[1].any()


def test_queries_may_read_a_context_that_is_split() -> None:
    """Cross mixers: every rank has queries of its own, here the same ones, and reads a text of which it has a part."""
    torch.manual_seed(0)
    mixer, x, text = PoM(DIM).double(), torch.randn(BATCH, 5, DIM).double(), torch.randn(BATCH, 11, DIM).double()
    mask = torch.rand(BATCH, 11) > 0.3

    def read(split: TokenSplit) -> Tensor:
        return mixer(x, text[:, split.tokens], mask[:, split.tokens], split=split)

    for part in on_ranks([6, 4, 1], read)[0]:
        torch.testing.assert_close(part, mixer(x, text, mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [None, "causal", BlockCausal(16)], ids=["none", "causal", "block-causal"])
def test_what_is_sent_does_not_depend_on_the_tokens(mask: Mask) -> None:
    """One collective for the whole batch, of a sum or two for each sample."""
    form = Form()
    sent = []
    for num_tokens in (64, 512):
        leaves = operands(num_tokens, form)
        sent.append(on_ranks([num_tokens // 2] * 2, lambda split, leaves=leaves: mix(form, leaves, mask, split))[1])
    expected = {"none": ("all-reduce", WIDTH + 1), "causal": ("all-gather", WIDTH), "frames": ("all-gather", 2 * WIDTH)}
    name, width = expected["none" if mask is None else "causal" if mask == "causal" else "frames"]
    assert sent == [[(name, BATCH * width)]] * 2


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Segments([4, 5]), "segments"),
        (torch.ones(BATCH, 9, 9, dtype=torch.bool), "segments"),
        (None, "expected 8 local tokens, got 9"),
    ],
)
def test_operands_that_do_not_fit_a_split_are_refused(mask: Mask, message: str) -> None:
    form, leaves = Form(), operands(9, Form())
    split = TokenSplit((0, 8, 17), 0, ThreadCollectives(Meeting(2), 0))
    with pytest.raises(ValueError, match=message):
        polynomial_mixer(Context(leaves["u"], form), Queries(leaves["gate"]), mask, split=split)


def test_splits_that_leave_a_rank_without_tokens_are_refused() -> None:
    nobody = ThreadCollectives(Meeting(3), 0)
    with pytest.raises(ValueError, match="2 tokens cannot be split over 3 ranks"):
        TokenSplit.even(2, 3, 0, nobody)
    with pytest.raises(ValueError, match="ascending"):
        TokenSplit((0, 4, 4), 0, nobody)
    with pytest.raises(ValueError, match="rank below 2"):
        TokenSplit((0, 4, 8), 2, nobody)
    with pytest.raises(ValueError, match="attention reads all tokens"):
        Attention(DIM, 2)(torch.zeros(1, 4, DIM), split=TokenSplit((0, 4, 8), 0, nobody))


# --- networks --------------------------------------------------------------------------------------------------------


def lively(model: nn.Module) -> nn.Module:
    """Weights under which no part of the network is the identity, in float64."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model.double()


def assert_same_as_whole(
    model: nn.Module, latents: Tensor, lengths: list[int], *inputs: object, start: Tensor | None = None
) -> None:
    """Hold the outputs on the ranks, and the gradients of all weights, to those of the network on all tokens."""
    more = {} if start is None else {"start": start}
    latents = latents.double()

    def predict(split: TokenSplit) -> Tensor:
        return model(latents, *inputs, **more, split_tokens=lambda num_tokens: _checked(split, num_tokens))

    whole = latent_tokens(model.config, model(latents, *inputs, **more))
    parts, collectives = on_ranks(lengths, predict)
    ours, weights = torch.cat(parts, dim=1), list(model.parameters())
    assert_equal([ours, *gradients(ours, weights)], [whole, *gradients(whole, weights)])
    assert len(collectives) == len(model.blocks())


def _checked(split: TokenSplit, num_tokens: int) -> TokenSplit:
    assert split.num_tokens == num_tokens
    return split


@pytest.mark.parametrize("lengths", [[13, 11], [9, 2, 12, 1]], ids=str)
def test_image_network(lengths: list[int]) -> None:
    model = lively(make_model(ImageModelConfig(latent_shape=(3, 8, 12), num_classes=5, dim=16, depth=2)))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(BATCH, 3, 8, 12, generator=generator)
    assert_same_as_whole(model, latents, lengths, torch.tensor([0.2, 0.7]).double(), torch.tensor([1, 5]))


VIDEO = {"kind": "video", "latent_shape": (3, 6, 4, 8), "text_dim": 6, "dim": 16, "depth": 2}


@pytest.mark.parametrize("lengths", [[13, 11], [9, 2, 12, 1], [8, 16]], ids=str)
@pytest.mark.parametrize("temporal", ["none", "block_causal"])
@pytest.mark.parametrize("per_frame_group", [False, True])
def test_video_network(per_frame_group: bool, temporal: str, lengths: list[int]) -> None:
    """Three frame groups of 8 tokens."""
    model = lively(make_model(VideoModelConfig.model_validate({**VIDEO, "temporal": temporal})))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(BATCH, 3, 6, 4, 8, generator=generator)
    t = torch.rand((BATCH, 3) if per_frame_group else (BATCH,), generator=generator).double()
    text = Text(torch.randn(BATCH, 5, 6, generator=generator), torch.rand(BATCH, 5, generator=generator) > 0.3)
    assert_same_as_whole(model, latents, lengths, t, text, start=torch.tensor([0, 4]))


@pytest.mark.parametrize("shape", [(3, 4, 8), (3, 1, 4, 8)], ids=["picture", "clip of one frame"])
def test_pictures_of_a_video_network(shape: tuple[int, ...]) -> None:
    model = lively(make_model(VideoModelConfig.model_validate(VIDEO)))
    generator = torch.Generator().manual_seed(0)
    text = Text(torch.randn(BATCH, 5, 6, generator=generator), torch.ones(BATCH, 5, dtype=torch.bool))
    assert_same_as_whole(
        model, torch.randn(BATCH, *shape, generator=generator), [5, 3], torch.tensor([0.2, 0.7]).double(), text
    )
