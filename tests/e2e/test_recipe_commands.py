"""Commands that read recipes and start nothing: `config validate`, `config show`, and `train` on a sweep."""

from __future__ import annotations

from pathlib import Path

from pomscale.config.load import load_train_recipe
from support.running import pomscale


def test_validate_lists_the_problems_of_all_files_and_exits_2(tiny_recipe: Path, tmp_path: Path) -> None:
    text = tiny_recipe.read_text()
    lines = text.splitlines()
    typo, short = tmp_path / "typo.yaml", tmp_path / "short.yaml"
    typo.write_text(f"{text}lr: 1\nsede: 1\n")
    short.write_text(text.replace("total_samples: 960", "total_samples: 961"))
    done = pomscale("config", "validate", tiny_recipe, typo, short, expect=2)
    where = next(number for number, line in enumerate(lines, 1) if line.startswith("training:"))
    assert done.stderr.removeprefix("error: ").splitlines() == [
        f"{typo}:{len(lines) + 1}: lr: unknown key; did you mean 'optimizer.lr'?",
        f"{typo}:{len(lines) + 2}: sede: unknown key; did you mean 'seed'?",
        f"{short}:{where}: training.total_samples: 961 is not a multiple of training.global_batch 32",
    ]
    assert done.stdout == ""
    pomscale("config", "validate", tiny_recipe)


def test_show_prints_the_recipe_that_training_would_use(tiny_recipe: Path, tmp_path: Path) -> None:
    shown = tmp_path / "shown.yaml"
    shown.write_text(pomscale("config", "show", tiny_recipe, "optimizer.lr=3e-4").stdout)
    assert load_train_recipe(shown) == load_train_recipe(tiny_recipe, ["optimizer.lr=3e-4"])


def test_train_says_how_to_start_a_sweep_or_a_point(tiny_recipe: Path) -> None:
    with tiny_recipe.open("a") as file:
        file.write("sweep: {optimizer.lr: [1.0e-4, 2.0e-4], model.degree: [2, 3]}\n")
    done = pomscale("train", tiny_recipe, expect=2)
    assert f"pomscale launch {tiny_recipe} --cluster" in done.stderr
    offered = f"pomscale train {tiny_recipe} sweep={{}} name=NAME optimizer.lr=0.0001 model.degree=2"
    assert offered in done.stderr
    one = load_train_recipe(tiny_recipe, offered.split()[3:])
    assert (one.name, one.sweep, one.model.degree) == ("NAME", {}, 2)
