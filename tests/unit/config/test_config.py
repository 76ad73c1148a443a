"""Recipes: inheritance, overrides, and errors that name file, line, key and remedy, all at once and before torch."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pomscale.config.codecs import VaeCodecConfig
from pomscale.config.encode import EncodeRecipe
from pomscale.config.identity import differences
from pomscale.config.load import dump_recipe, load_encode_recipe, load_recipe, load_train_recipe
from pomscale.config.mixer import AttentionMixerConfig, PomMixerConfig
from pomscale.config.train import TrainRecipe
from pomscale.config.yaml_file import RecipeError, read_source

Write = Callable[[str, str], Path]

TRAIN = """\
kind: train
name: run
codec: {name: pixel}
data: {path: latents}
model:
  latent_shape: [12, 8, 8]
  num_classes: 10
  dim: 16
  depth: 2
training: {total_samples: 640, global_batch: 64}
checkpoint: {every_samples: 128}
"""
ENCODE = """\
kind: encode
name: pictures
output: latents
codec: {name: pixel}
source: {kind: image_folder, path: raw}
transform: {size: 16}
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def train(path: Path, *overrides: str) -> TrainRecipe:
    return load_train_recipe(path, list(overrides))


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, list(overrides))
    return [problem.replace(f"{path.parent}/", "") for problem in caught.value.problems]


def test_a_complete_recipe_has_no_problems(write: Write) -> None:
    """The two texts that the tests below damage."""
    assert isinstance(load_recipe(write("train.yaml", TRAIN)), TrainRecipe)
    assert isinstance(load_recipe(write("encode.yaml", ENCODE)), EncodeRecipe)


# --- inheritance -----------------------------------------------------------------------------------------------------


def test_a_chain_of_bases_merges_sections_and_replaces_lists(write: Write) -> None:
    write("base.yaml", "a: {x: 1, y: {p: 1, q: 2}}\nlist: [1, 2, 3]\nscalar: 1\n")
    write("middle/middle.yaml", "base: ../base.yaml\na: {y: {q: 3}}\nlist: [4]\n")
    child = write("child.yaml", "base: middle/middle.yaml\na: {z: 5}\nscalar: {now: section}\n")
    values = read_source(child).values
    assert values == {"a": {"x": 1, "y": {"p": 1, "q": 3}, "z": 5}, "list": [4], "scalar": {"now": "section"}}


def test_null_takes_a_section_of_the_base_away(write: Write) -> None:
    write("base.yaml", TRAIN + "validation: {path: heldout, every_samples: 64}\n")
    assert train(write("child.yaml", "base: base.yaml\nvalidation: null\n")).validation is None


def test_a_circle_of_bases_is_told_with_its_chain(write: Write) -> None:
    write("a.yaml", "base: b.yaml\n")
    (problem,) = problems(write("b.yaml", "base: a.yaml\n"))
    assert "in a circle: b.yaml -> a.yaml -> b.yaml" in problem


def test_a_missing_base_is_told_at_its_line(write: Write) -> None:
    (problem,) = problems(write("child.yaml", "name: x\nbase: none.yaml\n"))
    assert problem == "child.yaml:2: base: no such recipe none.yaml"


def test_a_base_must_be_one_path(write: Write) -> None:
    (problem,) = problems(write("child.yaml", "base: [a.yaml, b.yaml]\n"))
    assert problem == "child.yaml:1: base: must be one path, relative to this file"


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=3E+2", 300.0),
        ("optimizer.betas=[0.8, 0.9]", [0.8, 0.9]),
        ("optimizer.grad_clip=null", None),
        ("compute.compile=true", True),
        ("monitoring.wandb.entity='1e-4'", "1e-4"),
        ("name=a=b", "a=b"),
        ("validation.path=heldout", "heldout"),
        ("model={dim: 8}", {"dim": 8}),
    ],
)
def test_an_override_is_a_yaml_value_at_any_depth(write: Write, override: str, expected: Any) -> None:
    value: Any = read_source(write("train.yaml", TRAIN), [override]).values
    for key in override.split("=", maxsplit=1)[0].split("."):
        value = value[key]
    assert (value, type(value)) == (expected, type(expected))


def test_overrides_reach_the_recipe_and_the_last_one_wins(write: Write) -> None:
    recipe = train(write("train.yaml", TRAIN), "optimizer.lr=1e-2", "monitoring.wandb.mode=online", "optimizer.lr=3e-4")
    assert (recipe.optimizer.lr, recipe.monitoring.wandb.mode) == (3e-4, "online")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "must look like section.key=value"),
        ("=3", "must look like section.key=value"),
        ("optimizer..lr=3", "must look like section.key=value"),
        ("model.mixer=[pom", "the value is not valid YAML"),
        ("name=2024-13-45", "the value is not valid YAML"),
        ("name.first=x", "name is a value, not a section"),
    ],
)
def test_a_malformed_override_is_quoted(write: Write, override: str, message: str) -> None:
    (problem,) = problems(write("train.yaml", TRAIN), override)
    assert problem.startswith(f"override {override!r}: {message}")


def test_a_wrong_override_is_quoted_instead_of_a_line(write: Write) -> None:
    found = problems(write("train.yaml", TRAIN), "model.dim=-4", "training={total_samples: 0, global_batch: 64}")
    assert [problem.partition(": input")[0] for problem in found] == [
        "override 'model.dim=-4': model.dim",
        "override 'training={total_samples: 0, global_batch: 64}': training.total_samples",
    ]


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nmodel:\n  dim: 1\n  dim: 2\n", "bad.yaml:4: model.dim: written twice (first: {folder}bad.yaml:3)"),
        ("name: [a\nkind: b\n", "bad.yaml:2: not valid YAML"),
        ("- a\n", "bad.yaml:1: a recipe is a mapping of keys to values"),
        ("", "bad.yaml:1: a recipe is a mapping of keys to values"),
        ("kind: train\nname: 2024-13-45\n", "bad.yaml:2: name: month must be in 1..12"),
        ("name: a\x00b\n", "bad.yaml: not valid YAML"),
        ("kind: !!python/name:os.system x\n", "bad.yaml:1: not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_at_its_line(write: Write, text: str, expected: str) -> None:
    (problem,) = problems(write("bad.yaml", text))
    assert problem.startswith(expected.format(folder=""))


def test_a_path_that_cannot_be_read_is_named(write: Write, tmp_path: Path) -> None:
    assert problems(tmp_path / "none.yaml") == ["none.yaml: no such recipe file"]
    assert "not a readable recipe file" in problems(tmp_path)[0]
    assert "not a readable recipe file" in problems(write("train.yaml", TRAIN) / "below-a-file.yaml")[0]
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    assert "not a readable recipe file" in problems(tmp_path / "latin.yaml")[0]


# --- wrong keys and values -------------------------------------------------------------------------------------------


def test_all_problems_are_listed_each_at_the_file_and_line_that_wrote_it(write: Write) -> None:
    write("base.yaml", TRAIN.replace("dim: 16", "dim: wide") + "optimiser: {lr: 1}\n")
    child = write("child.yaml", "# a comment\nbase: base.yaml\nmodel:\n  depht: 3\nseed: -1\n")
    assert sorted(problems(child, "compute.precision=fp16")) == [
        "base.yaml:12: optimiser: unknown key; did you mean 'optimizer'?",
        "base.yaml:8: model.dim: input should be a valid integer, unable to parse string as an integer, got 'wide'",
        "child.yaml:4: model.depht: unknown key; did you mean 'depth'?",
        "child.yaml:5: seed: input should be greater than or equal to 0, got -1",
        "override 'compute.precision=fp16': compute.precision: must be 'fp32' or 'bf16', got 'fp16'; "
        "did you mean 'bf16'?",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("optimizer: {weight_deacy: 1}", "optimizer.weight_deacy: unknown key; did you mean 'weight_decay'?"),
        ("lr: 1e-4", "lr: unknown key; did you mean 'optimizer.lr'?"),
        ("total_samples: 10", "total_samples: unknown key; did you mean 'training.total_samples'?"),
        ("train: {total_samples: 10}", "train: unknown key; did you mean 'training'?"),
        ("ema: {zzz: 1}", "ema.zzz: unknown key; the nearest valid key is 'rampup_ratio'"),
        ("monitoring: {wandb: {proejct: x}}", "monitoring.wandb.proejct: unknown key; did you mean 'project'?"),
        ("validation: {every_samples: 8}", "validation.path: missing; set it here or in a base file"),
        (
            "diffusion: {objective: flwo}",
            "diffusion.objective: must be 'flow', 'eps' or 'x', got 'flwo'; did you mean 'flow'?",
        ),
        ("engine: fdsp2", "engine: must be 'fsdp2' or 'deepspeed', got 'fdsp2'; did you mean 'fsdp2'?"),
        ("optimizer: {lr: .nan}", "optimizer.lr: input should be a finite number, got nan"),
    ],
)
def test_a_typo_is_told_with_its_line_and_a_remedy(write: Write, line: str, expected: str) -> None:
    assert problems(write("train.yaml", f"{TRAIN}{line}\n")) == [f"train.yaml:12: {expected}"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "kind: train",
            "kind: trian",
            "kind: 'trian' is none of 'train', 'encode', 'pipeline', 'experiment'; did you mean 'train'?",
        ),
        ("kind: train\n", "", "kind: missing; it says what kind of section this is"),
        (
            "name: pixel",
            "name: pixle",
            "codec.name: 'pixle' is none of 'pixel', 'uint8', 'vae'; did you mean 'pixel'?",
        ),
        ("name: pixel", "block: 2", "codec.name: missing; it says what kind of section this is"),
        ("name: pixel", "name: pixel, blok: 2", "codec.blok: unknown key; did you mean 'block'?"),
        ("name: pixel", "name: vae, path: p, blok: 2", "codec.blok: unknown key; the nearest valid key is 'subfolder'"),
        (
            "depth: 2",
            "depth: 2\n  mixer: [pom, {kind: attention, degree: 3}]",
            "model.mixer.1.degree: unknown key; another kind of this section has it, the keys of this one are kind, h",
        ),
        ("data: {path: latents}\n", "", "data: missing; set it here or in a base file"),
        (
            "depth: 2",
            "depth: 2\n  mixer: atention",
            "model.mixer: must be 'pom' or 'attention', got 'atention'; did you",
        ),
        ("depth: 2", "depth: 2\n  mixer: {a: 1}", "model.mixer.kind: missing; it says what kind of section"),
    ],
)
def test_a_damaged_recipe_has_one_problem(write: Write, old: str, new: str, expected: str) -> None:
    (problem,) = problems(write("train.yaml", TRAIN.replace(old, new, 1)))
    assert problem.partition(": ")[2].startswith(expected)


def test_what_an_override_leaves_open_is_missing_in_the_override(write: Write) -> None:
    """The key model.mixer is in no file: the override makes the table."""
    assert problems(write("train.yaml", TRAIN), "model.mixer.heads=4") == [
        "override 'model.mixer.heads=4': model.mixer.kind: missing; it says what kind of section this is"
    ]


def test_a_section_of_another_kind_inherits_nothing(write: Write) -> None:
    table = "mixer: {kind: pom, form: coefficients, heads: 4}"
    write("base.yaml", TRAIN.replace("depth: 2", f"depth: 2\n  {table}"))
    same = train(write("same.yaml", "base: base.yaml\nmodel: {mixer: {kind: pom, heads: 8}}\n")).model.mixer
    other = train(write("other.yaml", "base: base.yaml\nmodel: {mixer: {kind: attention, heads: 2}}\n")).model.mixer
    assert isinstance(same, PomMixerConfig)
    assert same.model_dump(exclude_unset=True) == {"kind": "pom", "form": "coefficients", "heads": 8}
    assert other == AttentionMixerConfig(kind="attention", heads=2)


def test_an_unknown_preset_does_not_hide_other_problems(write: Write) -> None:
    text = "\n".join(line for line in TRAIN.splitlines() if "dim" not in line and "depth" not in line)
    path = write("train.yaml", text.replace("model:", "model:\n  preset: dipom-x-2\n  patch: 4"))
    assert problems(path) == [
        "train.yaml:6: model.preset: unknown model 'dipom-x-2'; did you mean 'dipom-xl-2'?",
        "train.yaml:7: model.patch: unknown key; did you mean 'patch_size'?",
    ]


def test_a_preset_fills_only_what_the_recipe_leaves_open(write: Write) -> None:
    text = TRAIN.replace("  dim: 16\n  depth: 2\n", "  preset: dit-b-4\n  depth: 3\n")
    model = train(write("train.yaml", text)).model
    assert (model.dim, model.depth, model.patch_size, model.mixer, model.num_heads) == (768, 3, 4, "attention", 12)


PACKED = "{total_samples: 650, global_tokens: 512"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("mesh.sp=2", "mesh.sp: packed samples are not split over ranks; use mesh.sp: 1"),
        ("engine=deepspeed deepspeed.zero_stage=3", "deepspeed.zero_stage: stage 3 hangs on packed steps"),
        ("compute.compile=true", "compute.compile: packed steps have other shapes each time; use compile: false"),
    ],
)
def test_what_packed_steps_do_not_do_is_named(write: Write, override: str, expected: str) -> None:
    recipe = write("train.yaml", TRAIN)
    packed = load_train_recipe(recipe, [f"training={PACKED}}}"])
    assert (packed.training.total_samples, packed.training.order_batch) == (650, 1)
    assert "global_tokens" not in load_train_recipe(recipe).model_dump()["training"], "older runs keep their identity"
    with pytest.raises(RecipeError, match=re.escape(expected)):
        load_train_recipe(recipe, [f"training={PACKED}}}", *override.split()])


def test_a_recipe_of_the_other_kind_is_refused(write: Write) -> None:
    with pytest.raises(RecipeError, match="kind: this is a recipe for `pomscale data encode`"):
        load_train_recipe(write("encode.yaml", ENCODE))
    with pytest.raises(RecipeError, match="kind: this is a recipe for `pomscale train`"):
        load_encode_recipe(write("train.yaml", TRAIN))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.total_samples=650", "training.total_samples: 650 is not a multiple of training.global_batch 64"),
        (
            "training.global_batch=null",
            "training.global_batch: give either global_batch, samples of one shape per step",
        ),
        (
            "training.global_tokens=512",
            "training.global_batch: give either global_batch, samples of one shape per step",
        ),
        ("training.micro_tokens=512", "training.micro_tokens: is for packed steps (global_tokens); use micro_batch"),
        (
            f"training={PACKED}, micro_batch: 2}}",
            "training.micro_batch: is for steps of global_batch samples; use micro_",
        ),
        ("schedule={warmup_samples: 400, cooldown_samples: 300}", "schedule: warmup_samples + cooldown_samples exceed"),
        ("sampling.num_classes=11", "sampling.num_classes: more than model.num_classes"),
        ("model.patch_size=3", "model.latent_shape: 8x8 is not divisible by patch_size 3"),
        ("model.dim=18", "model.dim: positions need a multiple of 4, got 18"),
        ("model.mixer=[pom, pom, attention]", "model.mixer: a pattern of 3 does not divide depth 2"),
        ("name=" + "x" * 241, "name: 241 bytes; it is the name of a folder, so give at most 240"),
        ("model.mixer=[]", "model.mixer: list should have at least 1 item"),
        (
            "model={latent_shape: [4, 8, 8], num_classes: 10, dim: 20, depth: 1, mixer: attention}",
            "model.num_heads: 16",
        ),
        ("ema={post_hoc: {widths: [0.05, 0.0500000001], every_samples: 64}}", "ema.post_hoc.widths: a width is there"),
        ("checkpoint={every_samples: 128, keep_best: 2}", "checkpoint.keep_best: nothing is measured"),
        ("diffusion.noise_scale=2", "diffusion.noise_scale: is for objective x, and this is flow"),
        ("diffusion={objective: eps, noise_scale: 1}", "diffusion.noise_scale: is for objective x, and this is eps"),
        ("diffusion={objective: eps, clamp: 0.1}", "diffusion.clamp: is for objective x, and this is eps"),
        ("diffusion={objective: x, clamp: 0}", "diffusion.clamp: input should be greater than 0"),
        ("diffusion={objective: x, clamp: 1}", "diffusion.clamp: input should be less than 1"),
        ("diffusion={objective: x, noise_scale: 0}", "diffusion.noise_scale: input should be greater than 0"),
        (
            "diffusion={objective: eps, time: {shift_base_tokens: 16}}",
            "diffusion.time.shift_base_tokens: is for objectives flow and x, and this is eps",
        ),
        ("mesh.sp=17", "mesh.sp: 17 ranks cannot share the 16 tokens of a sample; use at most 16"),
        ("faults.consistency_every_samples=640", "faults.consistency_every_samples: every parameter is on one rank"),
    ],
)
def test_values_that_contradict_each_other_are_named(write: Write, override: str, expected: str) -> None:
    (problem,) = problems(write("train.yaml", TRAIN), override)
    assert f": {expected}" in problem


def test_objective_x_has_the_clamp_and_noise_scale_of_jit_and_the_others_have_none(write: Write) -> None:
    path = write("train.yaml", TRAIN)
    fields = [
        (config.clamp, config.noise_scale)
        for config in (
            train(path).diffusion,
            train(path, "diffusion.objective=eps").diffusion,
            train(path, "diffusion.objective=x").diffusion,
            train(path, "diffusion={objective: x, clamp: null, noise_scale: 2}").diffusion,
        )
    ]
    assert fields == [(None, None), (None, None), (0.05, 1.0), (0.05, 2.0)]


def test_a_run_that_began_before_objective_x_goes_on_and_a_change_of_it_is_named(write: Write) -> None:
    path = write("train.yaml", TRAIN)
    flow, x = (train(path, f"diffusion.objective={name}").model_dump(mode="json") for name in ("flow", "x"))
    then = {**flow, "diffusion": {**flow["diffusion"], "time": dict(flow["diffusion"]["time"])}}
    del then["diffusion"]["clamp"], then["diffusion"]["noise_scale"], then["diffusion"]["time"]["shift_base_tokens"]
    assert differences(then, flow) == []
    assert "diffusion.objective: flow then, x now" in differences(then, x)
    other = train(path, "diffusion={objective: x, noise_scale: 2}").model_dump(mode="json")
    assert differences(x, other) == ["diffusion.noise_scale: 1.0 then, 2.0 now"]


def test_attention_cannot_share_tokens(write: Write) -> None:
    (problem,) = problems(write("train.yaml", TRAIN), "model.mixer=[pom, attention]", "model.num_heads=2", "mesh.sp=2")
    assert "mesh.sp: attention reads all tokens, which ranks cannot share" in problem


def test_what_depends_on_other_sections_is_allowed_where_they_are_there(write: Write) -> None:
    path = write("train.yaml", TRAIN)
    validation = "validation={path: x, every_samples: 128, num_time_bins: 4}"
    best = "checkpoint={every_samples: 128, keep_best: 2, best_metric: validation/loss_bin_03}"
    train(path, validation, best)
    (problem,) = problems(path, validation, best.replace("bin_03", "bin_04"))
    assert ": checkpoint.best_metric: 'validation/loss_bin_04' is not measured of a checkpoint; use " in problem
    compared = "faults.consistency_every_samples=640"
    train(path, compared, "fsdp2.shard_size=8")
    train(path, compared, "engine=deepspeed")
    assert "deepspeed.zero_stage" in problems(path, compared, "engine=deepspeed", "deepspeed.zero_stage=3")[0]


# --- the resolved recipe ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (TRAIN, []),
        (TRAIN, ["model.preset=dipom-xl-8", "model.mixer=[pom, attention]", "profile.start_samples=64"]),
        (TRAIN, ["name='1e5'", "monitoring.wandb.tags=['1e-4', '12', 'null', '2024-01-01', 'a: b', \"\u00e9\"]"]),
        (
            TRAIN,
            ["optimizer={lr: 1e-7, eps: 1e-12}", "ema.rampup_ratio=null", "validation={path: x, every_samples: 1}"],
        ),
        (ENCODE, ["codec={name: vae, path: /models/vae}", "transform.flip=true"]),
    ],
)
def test_a_dumped_recipe_reads_back_equal(write: Write, text: str, overrides: list[str]) -> None:
    recipe = load_recipe(write("recipe.yaml", text), overrides)
    assert load_recipe(write("dump.yaml", dump_recipe(recipe))) == recipe


def test_a_recipe_never_changes(write: Write) -> None:
    recipe = train(write("train.yaml", TRAIN), "codec={name: vae, path: p}")
    assert isinstance(recipe.codec, VaeCodecConfig)
    with pytest.raises(ValueError, match="frozen"):
        recipe.codec.path = "other"  # type: ignore[misc]


# --- the command -----------------------------------------------------------------------------------------------------


def pomscale(*arguments: str | Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-m", "pomscale", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def imported(result: subprocess.CompletedProcess[str]) -> set[str]:
    """Top-level packages in a log of -X importtime."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def test_help_imports_nothing_heavy() -> None:
    result = pomscale("--help", options=("-X", "importtime"))
    assert result.returncode == 0
    assert "argparse" in imported(result)
    assert imported(result).isdisjoint({"torch", "numpy", "pydantic", "yaml", "launch", "data_pipelines"})


@pytest.mark.parametrize(("verb", "text"), [(("train",), TRAIN), (("data", "encode"), ENCODE)])
def test_a_typo_is_told_before_torch_is_imported(write: Write, verb: tuple[str, ...], text: str) -> None:
    result = pomscale(*verb, write("recipe.yaml", text), "nmae=x", options=("-X", "importtime"))
    assert result.returncode == 2
    assert "override 'nmae=x': nmae: unknown key; did you mean 'name'?" in result.stderr
    assert "pydantic" in imported(result)
    assert imported(result).isdisjoint({"torch", "numpy"})
