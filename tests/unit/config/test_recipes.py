"""The recipes that are shipped: each is valid, completes in an editor, builds, and reads data that a recipe writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pomscale.config.encode import EncodeRecipe
from pomscale.config.identity import settings_of_latents
from pomscale.config.load import json_schema, load_recipe
from pomscale.config.train import TrainRecipe
from pomscale.models import make_model
from pomscale.plan import num_parameters
from support.paths import RECIPES

SCHEMA_FILE = RECIPES / "schema.json"
PATHS = sorted(RECIPES.rglob("*.yaml"))
SHIPPED = {str(path.relative_to(RECIPES)): load_recipe(path) for path in PATHS}
TRAIN = {name: recipe for name, recipe in SHIPPED.items() if isinstance(recipe, TrainRecipe)}
ENCODE = {name: recipe for name, recipe in SHIPPED.items() if isinstance(recipe, EncodeRecipe)}

each_recipe = pytest.mark.parametrize("path", PATHS, ids=SHIPPED)
each_train_recipe = pytest.mark.parametrize("recipe", TRAIN.values(), ids=TRAIN)


def test_every_folder_of_recipes_is_searched() -> None:
    assert {Path(name).parent.name for name in SHIPPED} >= {"", "image", "baselines", "hybrid", "data"}


# --- editors ---------------------------------------------------------------------------------------------------------


@each_recipe
def test_the_first_line_points_editors_to_the_schema(path: Path) -> None:
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    found = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert found
    assert (path.parent / found[1]).resolve() == SCHEMA_FILE
    assert second.startswith("# "), "the second line says what the recipe is"


def test_the_shipped_schema_is_the_current_one() -> None:
    """If this fails: pomscale config schema > recipes/schema.json"""
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == json_schema()


def unknown_keys(schema: dict[str, Any], node: Any, values: Any, prefix: str = "") -> list[str]:
    """Keys of `values` that no alternative of the schema's node has, as dotted names."""
    options = []
    pending = [node]
    while pending:
        option = pending.pop()
        if option is True:  # anything may stand here
            return []
        if "$ref" in option:
            option = schema["$defs"][option["$ref"].removeprefix("#/$defs/")]
        pending += option.get("anyOf", [])
        options.append(option)
    if not isinstance(values, dict):
        return []
    unknown = []
    for key, value in values.items():
        inner = [option["properties"][key] for option in options if key in option.get("properties", {})]
        inner += [option["additionalProperties"] for option in options if option.get("additionalProperties")]
        if not inner:
            unknown.append(prefix + key)
        unknown += unknown_keys(schema, {"anyOf": inner}, value, f"{prefix}{key}.") if inner else []
    return unknown


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema()


@each_recipe
def test_the_schema_knows_every_key(schema: dict[str, Any], path: Path) -> None:
    assert unknown_keys(schema, schema, yaml.safe_load(path.read_text(encoding="utf-8"))) == []


def test_the_schema_knows_no_other_key(schema: dict[str, Any]) -> None:
    wrong = {"kind": "train", "base": "a.yaml", "nam": 1, "codec": {"name": "pixel", "blok": 1}, "data": {"path": ""}}
    assert unknown_keys(schema, schema, wrong) == ["nam", "codec.blok"]


# --- what a recipe promises ------------------------------------------------------------------------------------------


@each_train_recipe
def test_the_model_builds(recipe: TrainRecipe) -> None:
    with torch.device("meta"):
        model = make_model(recipe.model)
    assert len(model.blocks()) == recipe.model.depth
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(recipe.model)


def encoded(path: str) -> EncodeRecipe:
    """Return the shipped recipe that encodes a dataset, or the one that it is split from."""
    pipelines = "".join(file.read_text() for file in (RECIPES / "pipelines").glob("*.yaml"))
    split = re.search(rf"data split (\S+) [^\n]*{re.escape(path)}=", pipelines)
    (found,) = (encode for encode in ENCODE.values() if encode.output == (split[1] if split else path))
    return found


@each_train_recipe
def test_a_shipped_encode_recipe_writes_the_training_data(recipe: TrainRecipe) -> None:
    """With the codec and latent shape that training will insist on; itself, or by a split in a shipped pipeline."""
    for component in recipe.data.components:
        source = encoded(component.path)
        stored, wanted = settings_of_latents(source.codec.model_dump(), recipe.codec.model_dump())
        assert stored == wanted
    source = encoded(recipe.data.components[0].path)
    block = {"pixel": getattr(recipe.codec, "block", None), "uint8": 1}.get(recipe.codec.name, 8)
    *frames, height, width = source.transform.targets[0]
    compression = 4 if recipe.codec.name == "vae" else 1
    assert recipe.model.latent_shape[1:] == (*(n // compression for n in frames), height // block, width // block)


def test_names_are_unique() -> None:
    """Two recipes of one name would share a run folder."""
    names = [recipe.name for recipe in TRAIN.values()]
    assert sorted(set(names)) == sorted(names)


def test_the_hybrid_is_six_parts_pom_to_one_part_attention() -> None:
    mixers = [mixer.kind for mixer in TRAIN["hybrid/dipom-xl-2-hybrid.yaml"].model.mixers]
    assert mixers == [*["pom"] * 6, "attention"] * 4
