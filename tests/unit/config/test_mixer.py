"""Mixers of a recipe: names, tables and lists of both, what they mean, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pomscale.config.load import dump_recipe, load_train_recipe
from pomscale.config.mixer import AttentionMixer, PomMixer, rotary_pairs
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.yaml_file import RecipeError
from pomscale.ops.pom.rotary import num_pairs
from support.paths import RECIPES

V2: dict[str, Any] = {"kind": "pom", "form": "coefficients"}


def image(mixer: Any, **fields: Any) -> ImageModelConfig:
    sizes = {"latent_shape": (4, 8, 8), "num_classes": 10, "dim": 64, "depth": 2}
    return ImageModelConfig.model_validate({**sizes, "mixer": mixer, **fields})


def video(mixer: Any) -> VideoModelConfig:
    sizes = {"kind": "video", "latent_shape": (4, 4, 8, 8), "text_dim": 8, "dim": 64, "depth": 2}
    return VideoModelConfig.model_validate({**sizes, "mixer": mixer})


@pytest.mark.parametrize(
    ("mixer", "expected"),
    [
        ("pom", PomMixer("product", 3, 4)),
        ("attention", AttentionMixer(8)),
        ({"kind": "pom"}, PomMixer("product", 3, 4)),
        ({"kind": "pom", "degree": 2, "expand": 1}, PomMixer("product", 2, 1)),
        ({"kind": "attention"}, AttentionMixer(8)),
        ({"kind": "attention", "heads": 2}, AttentionMixer(2)),
        (V2, PomMixer("coefficients", 3, 4)),
        (
            {**V2, "degree": 4, "expand": 1, "heads": 4, "groups": 2, "rope": True},
            PomMixer("coefficients", 4, 1, 4, 2, 2),
        ),
    ],
)
def test_what_a_table_leaves_open_is_that_of_the_model(mixer: Any, expected: Any) -> None:
    config = image(mixer, degree=3, expand=4, num_heads=8)
    assert config.mixers == [expected] * 2
    assert ImageModelConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_list_holds_names_and_tables() -> None:
    config = image(["pom", {"kind": "attention", "heads": 4}, {**V2, "heads": 8}], depth=6)
    three = [PomMixer("product", 2, 2), AttentionMixer(4), PomMixer("coefficients", 2, 2, 8)]
    assert config.mixers == three * 2
    assert not config.has_rope
    assert image([V2 | {"rope": True}, "pom"]).has_rope


def test_rope_has_the_axes_of_the_models_kind_and_none_for_a_text() -> None:
    table = {**V2, "heads": 16, "rope": True}
    assert [image(table).mixers[0].rope, video(table).mixers[0].rope] == [2, 3]
    assert video(table).mixers[0].without_rope() == PomMixer("coefficients", 2, 2, 16)


@pytest.mark.parametrize("mixer", ["pom", ["pom", "attention"]])
def test_names_are_dumped_as_they_are(mixer: Any) -> None:
    """Identities of clips' states and of runs are made of dumps, so those of older recipes must not change."""
    config = image(mixer)
    assert config.model_dump(mode="json")["mixer"] == mixer
    written = {} if mixer == "pom" else {"mixer": mixer}
    sizes = {"latent_shape": [4, 8, 8], "num_classes": 10, "dim": 64, "depth": 2}
    assert config.model_dump(mode="json", exclude_defaults=True) == sizes | written


def test_widths() -> None:
    product, coefficients = PomMixer("product", 3, 2), PomMixer("coefficients", 3, 2, heads=4)
    assert (product.width(8), product.num_gates(8)) == (48, 48)
    assert (coefficients.width(8), coefficients.num_gates(8)) == (16, 4)
    assert [coefficients.folds(2), coefficients.folds(1), product.folds(2)] == [True, False, False]


@pytest.mark.parametrize("num_axes", [2, 3])
def test_the_rule_of_rotary_pairs_is_the_operators(num_axes: Any) -> None:
    for width in range(1, 70):
        pairs = rotary_pairs(width, num_axes)
        if 2 * sum(pairs) == width and min(pairs) >= 1:
            assert pairs == num_pairs(width, num_axes)
        else:
            with pytest.raises(ValueError, match="rope"):
                num_pairs(width, num_axes)


@pytest.mark.parametrize(
    ("mixer", "expected"),
    [
        (
            "{kind: pom, form: coefficients, heads: 7}",
            "mixer.heads: 7 do not divide expand x dim = 2304; set a divisor",
        ),
        ("[pom, {kind: pom, form: coefficients, heads: 7}]", "mixer.1.heads: 7 do not divide expand x dim = 2304"),
        ("{kind: pom, form: coefficients, groups: 7}", "mixer.groups: 7 do not divide dim 1152; set a divisor"),
        ("{kind: pom, rope: true}", "mixer.rope: the product form (PoM v1) has none; set form: coefficients"),
        ("{kind: pom, heads: 4}", "mixer.heads: the product form (PoM v1) has none; set form: coefficients"),
        (
            "{kind: pom, form: coefficients, heads: 6, rope: true}",
            "mixer.heads: rope along 2 axes needs a multiple of 4, got 6 gates",
        ),
        ("{kind: pom, form: coefficients, rope: 2}", "mixer.rope: input should be a valid boolean, got 2"),
        ("{kind: pom, degree: 0}", "mixer.degree: input should be greater than 0, got 0"),
        ("{kind: attention, heads: 7}", "mixer.heads: 7 does not divide dim 1152; set a divisor"),
        ("{kind: pon}", "mixer.kind: 'pon' is none of 'pom', 'attention'; did you mean 'pom'?"),
        ("{form: product}", "mixer.kind: missing"),
        ("{kind: pom, haeds: 2}", "mixer.haeds: unknown key; did you mean 'heads'?"),
        ("[attention, {kind: attention, haeds: 2}]", "mixer.1.haeds: unknown key; did you mean 'heads'?"),
        ("[[pom]]", "mixer.0: must be 'pom' or 'attention', got ['pom']"),
    ],
)
def test_what_does_not_fit_is_one_error_that_names_the_key(mixer: str, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_train_recipe(RECIPES / "image" / "dipom-xl-2.yaml", [f"model.mixer={mixer}"])
    (line,) = str(error.value).splitlines()
    assert f": model.{expected}" in line


def test_heads_of_clips_have_a_pair_for_each_of_three_axes() -> None:
    with pytest.raises(ValidationError, match="rope along 3 axes needs an even number from 6 on, got 4 gates"):
        video({**V2, "heads": 4, "rope": True})
    with pytest.raises(
        ValidationError, match=r"mixer\.rope: rope along 3 axes needs an even number .*, got 4 channels"
    ):
        VideoModelConfig.model_validate(
            {
                **video("pom").model_dump(),
                "dim": 4,
                "num_heads": 1,
                "mixer": {**V2, "expand": 1, "rope": True},
            }
        )


def test_a_recipe_with_tables_is_read_back_from_its_dump() -> None:
    recipe = load_train_recipe(RECIPES / "image" / "dipom-v2-xl-2.yaml", ["model.mixer.degree=3"])
    assert "degree: 3" in dump_recipe(recipe)
    assert recipe.model.mixers == [PomMixer("coefficients", 3, 2, 16, 1, 2)] * 28
