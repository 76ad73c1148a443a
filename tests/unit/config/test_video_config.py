"""Recipes of clips: which network is meant, what its presets fill in, and one clear error for each contradiction."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomscale.config.load import dump_recipe, load_recipe, load_train_recipe
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.presets import IMAGE_PRESETS, VIDEO_PRESETS
from pomscale.config.train import TrainRecipe
from pomscale.config.yaml_file import RecipeError

VIDEO = """\
kind: train
name: clips
codec: {name: vae, path: p}
data: {path: latents}
model:
  kind: video
  latent_shape: [16, 6, 8, 12]
  text_dim: 32
  dim: 16
  depth: 2
training: {total_samples: 640, global_batch: 64}
checkpoint: {every_samples: 128}
"""
IMAGE_MODEL = "model={kind: image, latent_shape: [16, 8, 8], num_classes: 3, dim: 16, depth: 1}"
ENCODE = """\
kind: encode
name: clips
output: latents
codec: {name: vae, path: p}
source: {kind: video_folder, path: raw}
transform: {kind: video}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "clips.yaml"
    path.write_text(VIDEO)
    return path


def problem(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, list(overrides))
    (only,) = caught.value.problems
    return only


def clips(path: Path, *overrides: str) -> TrainRecipe:
    recipe = load_train_recipe(path, list(overrides))
    assert isinstance(recipe.model, VideoModelConfig)
    return recipe


def test_a_complete_recipe_has_no_problems(recipe: Path) -> None:
    """The text that the tests below damage."""
    model = clips(recipe).model
    assert isinstance(model, VideoModelConfig)
    assert (model.num_groups, model.num_tokens, model.patch_frames, model.temporal) == (3, 3 * 4 * 6, 2, "none")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.latent_shape=[16, 5, 8, 12]", "model.latent_shape: 5 frames are not divisible by patch_frames 2"),
        ("model.patch_frames=4", "model.latent_shape: 6 frames are not divisible by patch_frames 4"),
        ("model.latent_shape=[16, 6, 9, 12]", "model.latent_shape: 9x12 is not divisible by patch_size 2"),
        ("model.latent_shape=[16, 8, 12]", "model.latent_shape.3: "),
        ("model.dim=18", "model.dim: positions need a multiple of 4, got 18"),
        ("model.mixer=[pom, pom, attention]", "model.mixer: a pattern of 3 does not divide depth 2"),
        (
            "model={kind: video, latent_shape: [16, 6, 8, 12], text_dim: 8, dim: 20, depth: 1, mixer: attention}",
            "model.num_heads: 16 does not divide dim 20",
        ),
        ("model.temporal=causal", "model.temporal: must be 'none' or 'block_causal', got 'causal'"),
        ("model.num_classes=10", "model.num_classes: unknown key"),
        ("model.kind=clip", "model.kind: 'clip' is none of 'image', 'video'"),
        ("model.preset=vdipom-x-2", "model.preset: unknown model 'vdipom-x-2'; did you mean 'vdipom-xl-2'?"),
        ("model.preset=dipom-xl-2", "model.preset: 'dipom-xl-2' is a model of kind image, and model.kind is video"),
        ("codec={name: uint8}", "codec.name: uint8 makes latents of pictures, and model.kind is video"),
        ("diffusion.time.per_frame_group=true", "diffusion.time.per_frame_group: needs model.temporal: block_causal"),
        ("diffusion.max_start_group=-1", "diffusion.max_start_group: "),
        ("diffusion.class_dropout=0.1", "diffusion.class_dropout: unknown key; did you mean 'condition_dropout'?"),
        ("sampling.num_classes=2", "sampling.num_classes: is for models of classes; for texts give"),
        ("sampling.every_samples=64", "sampling.prompts: say what the clips are to show, or set sampling.every"),
        ("sampling.prompts=['']", "sampling.prompts.0: "),
        ("sampling.num_frames=5", "sampling.num_frames: 5 frames are not divisible by model.patch_frames 2"),
    ],
)
def test_values_that_contradict_each_other_are_named(recipe: Path, override: str, expected: str) -> None:
    assert f": {expected}" in problem(recipe, override)


def test_a_text_width_is_asked_for(recipe: Path) -> None:
    recipe.write_text(VIDEO.replace("  text_dim: 32\n", ""))
    assert problem(recipe).endswith("model.text_dim: missing; set it here or in a base file")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sampling.prompts=[a cat]", "sampling.prompts: is for models of texts, and this one is of classes"),
        ("sampling.num_frames=4", "sampling.num_frames: is for clips, and model.kind is image"),
        ("diffusion.time.per_frame_group=true", "diffusion.time.per_frame_group: is for clips, and model.kind is"),
        ("diffusion.max_start_group=4", "diffusion.max_start_group: is for clips, and model.kind is image"),
        ("data={path: x, text: y}", "data.text: is for models of texts, and this one is of classes"),
        ("data={path: null, mixture: [{path: x}, {path: y, text: z}]}", "data.mixture.1.text: is for models of"),
        ("validation={path: x, text: y, every_samples: 64}", "validation.text: is for models of texts, and"),
    ],
)
def test_what_only_clips_have_is_refused_for_pictures(recipe: Path, override: str, expected: str) -> None:
    recipe.write_text(VIDEO.split("model:", maxsplit=1)[0] + VIDEO[VIDEO.index("training:") :])
    assert load_train_recipe(recipe, [IMAGE_MODEL]).model.kind == "image"
    assert f": {expected}" in problem(recipe, IMAGE_MODEL, override)


def test_what_depends_on_other_values_is_allowed_where_they_are_there(recipe: Path) -> None:
    causal = clips(recipe, "model.temporal=block_causal", "diffusion.time.per_frame_group=true", "codec={name: pixel}")
    assert causal.diffusion.time.per_frame_group
    clips(recipe, "sampling={every_samples: 64, prompts: [a cat, a dog], num_frames: 12}")
    clips(recipe, "diffusion.max_start_group=100")
    clips(recipe, "model.mixer=[pom, attention]", "model.patch_frames=1", "sampling.num_frames=5")


@pytest.mark.parametrize("name", VIDEO_PRESETS)
def test_the_preset_says_that_clips_are_meant(recipe: Path, name: str) -> None:
    recipe.write_text(VIDEO.replace("  kind: video\n", "").replace("  dim: 16\n  depth: 2\n", f"  preset: {name}\n"))
    model = clips(recipe).model
    assert isinstance(model, VideoModelConfig)
    wanted = VIDEO_PRESETS[name]
    assert {field: getattr(model, field) for field in wanted} == wanted
    assert {mixer.kind for mixer in model.mixers} == {"pom" if name.startswith("vdipom") else "attention"}
    wider = clips(recipe, "model.depth=4", "model.patch_frames=1").model
    assert (wider.depth, wider.dim) == (4, model.dim)


def of_what(preset: str) -> dict[str, int]:
    return {"text_dim": 64} if preset.endswith("-text") else {"num_classes": 10}


def test_recipes_that_say_no_kind_are_of_pictures() -> None:
    """Recipes from before there were clips stay valid, with and without a preset."""
    shape = {"latent_shape": [4, 32, 32]}
    models = [{"dim": 16, "depth": 1, "num_classes": 10, **shape}]
    models += [{"preset": name, **shape, **of_what(name)} for name in IMAGE_PRESETS]
    for model in models:
        values = {
            "kind": "train",
            "name": "x",
            "codec": {"name": "sd_vae"},  # of that time, too
            "data": {"path": "x"},
            "model": model,
            "training": {"total_samples": 64, "global_batch": 64},
            "checkpoint": {"every_samples": 64},
        }
        assert isinstance(TrainRecipe.model_validate(values).model, ImageModelConfig)


def test_a_dumped_recipe_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    loaded = clips(recipe, "model.patch_frames=3", "sampling={every_samples: 64, prompts: ['yes', '12', 'a: b']}")
    (tmp_path / "dump.yaml").write_text(dump_recipe(loaded))
    assert load_recipe(tmp_path / "dump.yaml") == loaded


def test_which_codec_takes_which_media(tmp_path: Path) -> None:
    path = tmp_path / "encode.yaml"
    path.write_text(ENCODE)
    load_recipe(path)
    load_recipe(path, ["codec={name: pixel}"])
    assert "codec.name: uint8 takes a transform of kind image" in problem(path, "codec={name: uint8}")
    path.write_text(ENCODE.replace("video_folder", "image_folder").replace("kind: video", "kind: image, size: 16"))
    for codec in ("{name: sd_vae}", "{name: pixel}", "{name: cogvideox_vae}", "{name: vae, path: p}"):
        load_recipe(path, [f"codec={codec}"])
