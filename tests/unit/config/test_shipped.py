"""Recipes that come with pomscale are found by name, from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomscale.cli import main
from pomscale.config.load import load_recipe
from pomscale.config.shipped import recipe_file, shipped_recipes, summary
from pomscale.config.yaml_file import RecipeError
from support.paths import RECIPES


def test_a_name_is_the_path_without_its_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_file("image/dipom-xl-2") == RECIPES / "image" / "dipom-xl-2.yaml"
    assert load_recipe("quickstart") == load_recipe(RECIPES / "quickstart.yaml")


def test_a_file_comes_before_the_shipped_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data/digits").mkdir(parents=True)
    assert recipe_file("data/digits") == RECIPES / "data" / "digits.yaml", "a folder is no recipe"
    Path("quickstart").write_text("kind: nonsense")
    with pytest.raises(RecipeError, match="quickstart:1: kind: 'nonsense'"):
        load_recipe("quickstart")


@pytest.mark.parametrize("wrong", ["image/dipom-xl2", "dipom-xl-2", "recipes/image/dipom-xl-2.yaml"])
def test_an_unknown_recipe_names_the_nearest(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"no such recipe file; did you mean 'image/dipom-xl-2'\?.*config list"):
        load_recipe(wrong)


def test_what_is_nothing_like_a_shipped_recipe_gets_no_suggestion(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(tmp_path / "mine.yaml")
    assert str(raised.value) == f"{tmp_path}/mine.yaml: no such recipe file"


def test_config_list_has_a_line_for_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["config", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    assert {path.stem for path in RECIPES.rglob("*.yaml")} == {name.rpartition("/")[2] for name in shipped_recipes()}
    assert "image/dipom-xl-2                 DiPoM-XL/2 on ImageNet-256." in lines


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_line_about_a_recipe_is_a_whole_sentence(name: str) -> None:
    said = summary(shipped_recipes()[name])
    assert said.endswith(".")
    assert len(said) <= 100
