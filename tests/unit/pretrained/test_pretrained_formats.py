"""Exported folders and fine-tuning: what comes out of a checkpoint is what went in, and damage is told."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pomscale
from pomscale.base.errors import InputError
from pomscale.checkpoint.store import CheckpointStore
from pomscale.config.codecs import PixelCodecConfig
from pomscale.config.engine import CheckpointConfig
from pomscale.config.model import ImageModelConfig
from pomscale.config.sampling import SamplingConfig
from pomscale.config.train import DiffusionConfig, InitFromConfig
from pomscale.distributed.world import join_world
from pomscale.models import DiPoM, init_weights
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.exported import groups
from pomscale.pretrained.load import PretrainedDiPoM, load_pretrained
from pomscale.pretrained.weights import export, parameter_shapes, write_weights
from pomscale.training.initial_weights import fine_tuning

MODEL = ImageModelConfig(latent_shape=(4, 4, 4), num_classes=10, patch_size=1, dim=16, depth=2, num_heads=2)
SETS = {"halflife-2000": 1, "power-0.05": 2, "model": 3}  # name -> seed
LATENTS = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
INPUTS = (LATENTS, torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0, 10, 3]))


def card(model: ImageModelConfig = MODEL) -> ModelCard:
    return ModelCard(
        model=model, diffusion=DiffusionConfig(), sampling=SamplingConfig(), codec=PixelCodecConfig(name="pixel"),
        codec_identity=None, class_names=(), latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4,
        averages=("halflife-2000", "power-0.05"),
    )  # fmt: skip


def random_weights(model: ImageModelConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in parameter_shapes(model).items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("formats") / "run"
    weights = {name: random_weights(MODEL, seed) for name, seed in SETS.items()}
    state = {"model": weights.pop("model"), "ema": weights}
    meta = {
        "samples": 640,
        "card": card().model_dump(mode="json"),
        "recipe": {"name": "the run"},
        "data": [{"path": "data", "share": 1.0, "fingerprint": "abc", "index": "def"}],
        "versions": {"pomscale": "0", "torch": "1"},
    }
    with join_world("cpu"):
        store = CheckpointStore(folder / "checkpoints", CheckpointConfig(every_samples=640), None)
        store.save(640, state, meta)
        store.wait()
    return folder


def outputs(weights: dict[str, Tensor], model: ImageModelConfig = MODEL) -> Tensor:
    network = DiPoM(model)
    network.load_state_dict(weights)
    with torch.no_grad():
        return network(*INPUTS)


@pytest.mark.parametrize("weights", ["ema", *SETS])
def test_an_export_gives_the_outputs_of_its_weights_bit_by_bit(weights: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    export(run, out, weights=weights)
    name = "halflife-2000" if weights == "ema" else weights
    expected = random_weights(MODEL, SETS[name])
    for model in (
        pomscale.load_pretrained(out, device="cpu"),
        PretrainedDiPoM.from_pretrained(out, weights=name, device="cpu"),
    ):
        assert torch.equal(model(*INPUTS), outputs(expected))
    assert torch.equal(load_pretrained(run, weights=weights, device="cpu")(*INPUTS), outputs(expected))
    with pytest.raises(InputError, match=f"{out}: has no weights 'power-0.1'; there are: ema, {name}"):
        load_pretrained(out, weights="power-0.1")
    config = json.loads((out / "config.json").read_text())
    assert config["provenance"]["weights"] == name
    assert (config["provenance"]["run"], config["provenance"]["samples"]) == ("the run", 640)
    assert config["provenance"]["data"][0]["fingerprint"] == "abc"
    # Others read it with the format's own library, and it may be exported again.
    found = load_file(out / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    export(out, tmp_path / "again")
    assert torch.equal(load_pretrained(tmp_path / "again", device="cpu")(*INPUTS), outputs(expected))


def test_bf16_rounds_and_nothing_else(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", dtype="bf16")
    rounded = {name: value.bfloat16() for name, value in random_weights(MODEL, SETS["halflife-2000"]).items()}
    found = load_file(tmp_path / "out" / "halflife-2000.safetensors")
    assert all(torch.equal(found[name], value) for name, value in rounded.items())
    assert torch.equal(
        load_pretrained(tmp_path / "out", device="cpu")(*INPUTS),
        outputs({name: value.float() for name, value in rounded.items()}),
    )


def test_a_folder_appears_whole_or_not_at_all(run: Path, tmp_path: Path) -> None:
    def broken() -> Iterator[Tensor]:
        yield from list(random_weights(MODEL, 0).values())[:5]
        raise InputError("the checkpoint is damaged")

    with pytest.raises(InputError, match="the checkpoint is damaged"):
        write_weights(tmp_path / "out", card(), {}, parameter_shapes(MODEL), {"model": broken()})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out: exists already"):
        export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def flip_a_bit(folder: Path) -> None:
    path = folder / "halflife-2000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 4
    path.write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "halflife-2000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (flip_a_bit, r"halflife-2000\.safetensors: .* is damaged"),
    "an end": (cut, r"halflife-2000\.safetensors: cannot be read"),
    "a file": (lambda f: (f / "halflife-2000.safetensors").unlink(), r"halflife-2000\.safetensors: cannot be read"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: damaged"),
    "of diffusers": (lambda f: (f / "config.json").write_text('{"_class_name": "DiT"}'), "no weights of pomscale"),
    "a later format": (lambda f: change_config(f, format_version=9), "format version 9, this pomscale reads 1"),
    "a foreign card": (lambda f: change_config(f, card={"model": {}}), "does not understand"),
    "nothing": (lambda f: (f / "config.json").unlink(), "no complete checkpoint here"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_clear_error(case: str, run: Path, tmp_path: Path) -> None:
    do, message = DAMAGE[case]
    export(run, tmp_path / "out")
    do(tmp_path / "out")
    with pytest.raises(InputError, match=message) as error:
        load_pretrained(tmp_path / "out")
    assert str(tmp_path / "out") in str(error.value)


def test_groups_are_bounded_and_whole() -> None:
    shapes = {"a": (1024, 1024), "b": (3,), "large": (8192, 4096), "c": (15, 1024, 1024), "d": (2, 1024, 1024)}
    parts = list(groups(shapes))
    assert [list(part) for part in parts] == [["a", "b"], ["large"], ["c"], ["d"]]
    assert {name: shape for part in parts for name, shape in part.items()} == shapes


# --- Fine-tuning -----------------------------------------------------------------------------------------------------


def initial_weights(
    source: Path, target: ImageModelConfig, weights: str = "ema", class_names: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], str]:
    """Values in the order in which they are assigned, and the note."""
    tuning = fine_tuning(InitFromConfig(path=str(source), weights=weights), target, class_names, seed=7)
    model = DiPoM(target)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assigned: list[tuple[str, Tensor]] = []

    def assign(parameter: nn.Parameter, value: Tensor) -> None:
        assert (value.shape, value.dtype, value.device.type) == (parameter.shape, torch.float32, "cpu")
        assigned.append((names[id(parameter)], value))

    tuning(model, assign)
    assert sorted(name for name, _ in assigned) == sorted(names.values())  # each once
    return dict(assigned), tuning.note


def test_fine_tuning_at_another_resolution_begins_with_the_same_weights(run: Path, tmp_path: Path) -> None:
    larger = ImageModelConfig(**{**MODEL.model_dump(), "latent_shape": (4, 8, 6)})
    export(run, tmp_path / "out", weights="power-0.05")
    for source, weights, seed in [(run, "ema", 1), (run, "model", 3), (tmp_path / "out", "ema", 2)]:
        found, note = initial_weights(source, larger, weights)
        expected = random_weights(MODEL, seed)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert "class embedding" not in note
    assert "power-0.05 of" in note


@pytest.mark.parametrize(
    ("names_there", "names", "rows", "note"),
    [
        ("", "", [None] * 7, "7 of 7 classes are not among its 10 and start with new rows"),
        ("", "abcdefghij", [*range(10)], None),
        ("abcdefghij", "", [*range(10)], None),
        ("abcdefghij", "abcdefghij", [*range(10)], None),
        ("abcdefghij", "bacdefghij", [1, 0, *range(2, 10)], None),
        ("abcaefghij", "abcaefghij", [*range(10)], None),
        ("abcaefghij", "aaacj", [0, 3, None, 2, 9], "1 of 5 classes .*: a$"),
        ("abcdefghij", "jxcya", [9, None, 2, None, 0], "2 of 5 classes are not among its 10 .* embedding: x, y$"),
        ("abcdefghij", "klmnopqrst", [None] * 10, "10 of 10 classes .*: k, l, m, n, o, p, q, r, \\.\\.\\.$"),
    ],
)
def test_rows_of_other_classes_begin_anew_and_nothing_else(
    run: Path, tmp_path: Path, names_there: str, names: str, rows: list[int | None], note: str | None
) -> None:
    export(run, tmp_path / "out")
    of_run = card().model_copy(update={"class_names": tuple(names_there)})
    change_config(tmp_path / "out", card=of_run.model_dump(mode="json"))
    other = ImageModelConfig(**{**MODEL.model_dump(), "num_classes": len(rows)})
    found, said = initial_weights(tmp_path / "out", other, class_names=tuple(names))
    expected = random_weights(MODEL, SETS["halflife-2000"])
    fresh = DiPoM(other)
    init_weights(fresh, 7)
    embedding = expected["class_embedding.weight"]
    wanted = [fresh.class_embedding.weight[i] if row is None else embedding[row] for i, row in enumerate(rows)]
    # The last row stands for "no class", which is the same in every set.
    assert torch.equal(found.pop("class_embedding.weight"), torch.stack([*wanted, embedding[-1]]))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert re.search(note, said) if note else "class embedding" not in said


def test_another_network_is_refused_with_all_differences(run: Path) -> None:
    fields = {"latent_shape": (3, 4, 4), "num_classes": 5, "dim": 32, "depth": 4, "num_heads": 2}
    hybrid = ImageModelConfig(**fields, mixer=["pom", "attention"], patch_size=2, degree=3)
    with pytest.raises(InputError) as error:
        fine_tuning(InitFromConfig(path=str(run)), hybrid, (), seed=0)
    for difference in (
        "model.latent_shape[0]: 4 there, 3 here", "model.dim: 16 there, 32 here", "model.depth: 2 there, 4 here",
        "model.patch_size: 1 there, 2 here", "model.degree: 2 there, 3 here", "model.num_heads: none there, 2 here",
        "model.mixer: pom there, ['pom', 'attention', 'pom', 'attention'] here",
    ):  # fmt: skip
        assert difference in str(error.value)
    assert "num_classes" not in str(error.value)
    # What a network has no use for makes no difference.
    fine_tuning(InitFromConfig(path=str(run)), ImageModelConfig(**{**MODEL.model_dump(), "num_heads": 4}), (), seed=0)


def test_weights_that_are_not_there_are_told_before_training(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no weights 'halflife-9'; there are: ema, halflife-2000, power"):
        fine_tuning(InitFromConfig(path=str(run), weights="halflife-9"), MODEL, (), seed=0)
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "samples-000000000640")
    with pytest.raises(InputError, match="no complete checkpoint here"):
        fine_tuning(InitFromConfig(path=str(tmp_path / "run")), MODEL, (), seed=0)
