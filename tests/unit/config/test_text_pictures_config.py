"""Recipes of pictures of a text: what they say, what their presets fill in, and one clear error for a contradiction."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomscale.config.identity import differences
from pomscale.config.load import load_recipe, load_train_recipe
from pomscale.config.model import ImageModelConfig
from pomscale.config.presets import IMAGE_PRESETS, VIDEO_PRESETS
from pomscale.config.yaml_file import RecipeError

RECIPE = """\
kind: train
name: pictures
codec: {name: sd_vae}
data: {path: latents, text: texts}
model:
  latent_shape: [4, 8, 12]
  text_dim: 32
  dim: 16
  depth: 2
sampling: {every_samples: 64, prompts: [a cat, a dog]}
training: {total_samples: 640, global_batch: 64}
checkpoint: {every_samples: 128}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "pictures.yaml"
    path.write_text(RECIPE)
    return path


def problem(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, list(overrides))
    (only,) = caught.value.problems
    return only


def model_of(path: Path, *overrides: str) -> ImageModelConfig:
    model = load_train_recipe(path, list(overrides)).model
    assert isinstance(model, ImageModelConfig)
    return model


def test_a_text_comes_in_by_cross_mixers_unless_it_is_in_context(recipe: Path) -> None:
    model = model_of(recipe)
    assert (model.text, model.has_cross_mixers, model.context_start) == ("cross", True, None)
    assert [model.num_block_tokens(number, 9) for number in range(2)] == [24, 24]
    model = model_of(recipe, "model.text=in_context", "model.text_start=1")
    assert (model.has_cross_mixers, model.context_start) == (False, 1)
    assert [model.num_block_tokens(number, 9) for number in range(2)] == [24, 33]
    assert model_of(recipe, "model.text=in_context").context_start == 0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_classes=3", "model.text_dim: pictures are of a class or of a text; leave out num_classes or"),
        ("model.text_dim=null", "model.num_classes: give the number of classes of the dataset, or, for pictures of a"),
        ("model.text=crossed", "model.text: must be 'cross' or 'in_context', got 'crossed'"),
        ("model.text_start=1", "model.text_start: is for text: in_context; cross mixers are in all blocks"),
        ("model.in_context={tokens: 4, start: 1}", "model.in_context: these are tokens of a class, and pictures of a"),
        ("sampling.num_classes=2", "sampling.num_classes: is for models of classes; for texts give sampling.prompts"),
        ("sampling.prompts=[]", "sampling.prompts: say what the pictures are to show, or set sampling.every_samples"),
        ("sampling.num_frames=4", "sampling.num_frames: is for clips, and model.kind is image"),
    ],
)
def test_what_does_not_fit_is_named(recipe: Path, override: str, expected: str) -> None:
    assert f": {expected}" in problem(recipe, override)


def test_texts_in_context_begin_at_a_block(recipe: Path) -> None:
    expected = "model.text_start: 2 is no block; they are 0 to 1"
    assert f": {expected}" in problem(recipe, "model.text=in_context", "model.text_start=2")


@pytest.mark.parametrize("name", [name for name in IMAGE_PRESETS if name.endswith("-text")])
def test_presets(recipe: Path, name: str) -> None:
    recipe.write_text(RECIPE.replace("  dim: 16\n  depth: 2\n", f"  preset: {name}\n").replace("8, 12", "32, 64"))
    model = model_of(recipe)
    keys = ("dim", "depth", "patch_size", "ffn_expansion", "text")
    assert [getattr(model, key) for key in keys] == [IMAGE_PRESETS[name][key] for key in keys]
    assert model_of(recipe, "model.mixer=attention").has_cross_mixers == name.startswith("dipom-")
    assert "model.text_dim: pictures of a text need the width of its" in problem(recipe, "model.text_dim=null")


def test_sizes_are_those_of_clips_and_of_jit() -> None:
    sizes = ("dim", "depth", "num_heads", "ffn_expansion")
    for size in ("s", "b", "l", "xl"):
        one, other = IMAGE_PRESETS[f"dipom-{size}-2-text"], VIDEO_PRESETS[f"vdipom-{size}-2"]
        assert [one[key] for key in sizes] == [other[key] for key in sizes]
    for size in ("b", "l", "h"):
        one, other = IMAGE_PRESETS[f"jit-{size}-16-pom-text"], IMAGE_PRESETS[f"jit-{size}-16-pom"]
        assert one["text_start"] == other["in_context"]["start"]
        assert {key for key in other if one[key] != other[key]} == {"in_context"}


def test_dumps_of_classes_are_those_of_before_and_dumps_of_texts_read_back(recipe: Path) -> None:
    of_classes = {"latent_shape": (4, 8, 8), "dim": 16, "depth": 1, "num_classes": 3}
    dumped = ImageModelConfig.model_validate(of_classes).model_dump(mode="json")
    assert not {"text_dim", "text", "text_start"} & dumped.keys()
    assert dumped["num_classes"] == 3
    for overrides in ([], ["model.text=in_context", "model.text_start=1"]):
        model = model_of(recipe, *overrides)
        assert ImageModelConfig.model_validate(model.model_dump(mode="json")) == model


def test_a_run_cannot_change_how_its_texts_come_in(recipe: Path) -> None:
    then = load_train_recipe(recipe).model_dump(mode="json")
    now = load_train_recipe(recipe, ["model.text=in_context"]).model_dump(mode="json")
    assert differences(then, now) == ["model.text: None then, in_context now"]
