"""Choices of the trunk in a recipe: their defaults, presets, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pomscale.config.block import DropoutConfig
from pomscale.config.identity import differences
from pomscale.config.load import load_train_recipe
from pomscale.config.mixer import AttentionMixer, PomMixer
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.yaml_file import RecipeError
from support.paths import RECIPES

CHOICES = {"norm", "ffn", "gates", "positions", "time_embedding", "patch_embedding", "in_context", "dropout"}
QUICKSTART = RECIPES / "quickstart.yaml"


def image(**fields: Any) -> ImageModelConfig:
    sizes = {"latent_shape": (4, 8, 8), "num_classes": 10, "dim": 64, "depth": 4}
    return ImageModelConfig.model_validate({**sizes, **fields})


def test_dumps_without_these_choices_are_those_of_before() -> None:
    """Identities of runs and of clips' states are made of dumps."""
    assert not CHOICES & image().model_dump(mode="json").keys()
    dumped = image(norm="rms", in_context={"tokens": 3, "start": 1}).model_dump(mode="json")
    assert CHOICES & dumped.keys() == {"norm", "in_context"}
    assert ImageModelConfig.model_validate(dumped) == image(norm="rms", in_context={"tokens": 3, "start": 1})
    table = {"kind": "attention", "heads": 4}
    assert image(mixer=table).model_dump(mode="json")["mixer"] == table


def test_a_run_of_before_goes_on_and_another_choice_is_named() -> None:
    before = load_train_recipe(QUICKSTART).model_dump(mode="json")
    assert differences(before, before) == []
    now = load_train_recipe(QUICKSTART, ["model.norm=rms"]).model_dump(mode="json")
    assert differences(before, now) == ["model.norm: None then, rms now"]


@pytest.mark.parametrize(("size", "heads", "start"), [("b", 12, 4), ("l", 16, 8), ("h", 16, 10)])
def test_presets_of_jit(size: str, heads: int, start: int) -> None:
    plain, pom = (
        ImageModelConfig.model_validate(
            {"preset": f"jit-{size}-16{suffix}", "latent_shape": (3, 256, 256), "num_classes": 1000}
        )
        for suffix in ("", "-pom")
    )
    assert set(plain.mixers) == {AttentionMixer(heads, qk_norm=True, rope=2)}
    assert set(pom.mixers) == {PomMixer("coefficients", 3, 2, heads, rope=2)}
    for config in (plain, pom):
        assert config.in_context is not None
        assert [config.num_tokens, *(config.num_block_tokens(n, 120) for n in (start - 1, start))] == [256, 256, 288]
        assert (config.norm, config.gates, config.ffn) == ("rms", "g", "swiglu")
        assert config.block.ffn_width == int(int(4 * config.dim) * 2 / 3)


def test_dropout_has_a_range_of_blocks() -> None:
    rates = [block.dropout for block in image(dropout={"rate": 0.25, "first": 1, "last": 2}).blocks]
    assert rates == [0.0, 0.25, 0.25, 0.0]
    assert [DropoutConfig(rate=0.5).rate_of(n) for n in (0, 31)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.in_context={tokens: 4, start: 99}", "in_context.start: 99 is no block; they are 0 to"),
        ("model.positions=none", "positions: none leaves tokens without any; set rope: true in a mixer"),
        ("model.dropout={rate: 0.1, first: 99}", "dropout: its range, 99 to None, has no block"),
        ("model.dropout={rate: 1.0}", "model.dropout.rate: input should be less than 1"),
        ("model.gates=1", "model.gates: must be '1\\+g' or 'g'"),
        ("model.mixer={kind: attention, heads: 32, rope: true}", "needs a multiple of 4, got 2 channels of a head"),
    ],
)
def test_what_does_not_fit_is_one_error_that_names_the_key(override: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_train_recipe(QUICKSTART, ["model.dim=64", override])


def test_tokens_in_context_cannot_be_shared_and_clips_have_none() -> None:
    with pytest.raises(RecipeError, match=r"mesh.sp: tokens in context lie before those of the picture"):
        load_train_recipe(QUICKSTART, ["model.in_context={tokens: 4, start: 1}", "mesh.sp=2"])
    sizes = {"kind": "video", "latent_shape": (4, 4, 8, 8), "text_dim": 8, "dim": 64, "depth": 2}
    with pytest.raises(ValidationError, match="in_context: clips have a text and no class; leave it out"):
        VideoModelConfig.model_validate({**sizes, "in_context": {"tokens": 4, "start": 1}})
