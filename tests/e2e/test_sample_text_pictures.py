"""`pomscale sample` and `pomscale.sample` of models of pictures of a text: what is drawn, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pomscale
from pomscale.base.errors import InputError
from pomscale.cli import main
from pomscale.media.sheets import to_bytes
from pomscale.pretrained.load import PretrainedDiPoM
from support.tiny_films import save_picture_model, save_text_picture_model
from support.tiny_text_pictures import WAYS

TWO = ["three left", "one right"]

Sample = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_picture_model(tmp_path_factory.mktemp("cross"), sampling={"prompts": TWO, "guidance": 1.0})


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sample:
    """`pomscale sample ...` in tmp_path; what it has said on stdout, or on stderr where it is to fail."""
    monkeypatch.chdir(tmp_path)

    def sample_here(*arguments: Any, expect: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["sample", *map(str, arguments), "--device", "cpu"])
        said = capsys.readouterr()
        assert (ended.value.code or 0) == expect, said.err
        return said.err if expect else said.out + said.err

    return sample_here


def load(path: Path) -> PretrainedDiPoM:
    model = pomscale.load_pretrained(path, device="cpu")
    assert isinstance(model, PretrainedDiPoM)
    return model


def test_the_command_draws_what_the_public_call_draws(folder: Path, draw: Sample, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("three left\n\none right\n")
    said = draw(folder, "--prompts", "prompts.txt", "--num", "3", "--seed", "5", "--npz", "drawn.npz")
    assert "wrote grid.png: 2 prompts x 3" in said
    found = np.load(tmp_path / "drawn.npz")
    assert found["images"].shape == (6, 20, 12, 3)
    assert found["prompts"].tolist() == ["three left"] * 3 + ["one right"] * 3
    assert found["seeds"].tolist() == list(range(5, 11))
    model = load(folder)
    prompts = [prompt for prompt in TWO for _ in range(3)]
    latents = pomscale.sample(model, prompts, seeds=range(5, 11), num_steps=2, guidance=1.0)
    pictures = to_bytes(pomscale.decode(model, latents).clamp(0, 1)).transpose(0, 2, 3, 1)
    assert np.array_equal(found["images"], pictures)
    alone = pomscale.sample(model, TWO[1:], seeds=[8], num_steps=2, guidance=1.0)
    torch.testing.assert_close(alone[0], latents[3])
    assert not np.array_equal(found["images"][:3], found["images"][3:])


def test_prompts_come_from_the_recipe_and_sizes_from_the_command(folder: Path, draw: Sample, tmp_path: Path) -> None:
    draw(folder, "--num", "1", "--size", "12x28", "--npz", "drawn.npz", "--out", "new/g.png")
    found = np.load(tmp_path / "drawn.npz")
    assert found["prompts"].tolist() == TWO
    assert found["images"].shape == (2, 12, 28, 3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--classes", "1"], "which makes pictures of a text: describe them with --prompt"),
        (["--frames", "8", "--sheet", "s.png"], "--frames, --sheet: not for "),
        (["--size", "13x28"], "pictures of 13x28 pixels: codec pixel: "),
        (["--size", "10x28"], "sample: latent size 5x14 is not divisible by patch_size 2"),
    ],
)
def test_what_is_not_for_them_is_refused(folder: Path, draw: Sample, arguments: list[str], expected: str) -> None:
    assert expected in draw(folder, *arguments, expect=2)


def test_prompts_are_not_for_classes_and_classes_are_not_for_texts(folder: Path, draw: Sample, tmp_path: Path) -> None:
    of_classes = save_picture_model(tmp_path / "classes")
    assert "--prompt: not for " in draw(of_classes, "--prompt", "a cat", expect=2)
    with pytest.raises(InputError, match="conditioned on classes; give class ids"):
        pomscale.sample(load(of_classes), ["a cat"], seeds=[0])
    with pytest.raises(InputError, match="conditioned on texts; give a list of prompts"):
        pomscale.sample(load(folder), [1], seeds=[0])
    with pytest.raises(InputError, match="num_frames and known are for clips"):
        pomscale.sample(load(folder), ["a"], seeds=[0], num_frames=2)
    with pytest.raises(InputError, match="this model makes pictures of classes, of one size"):
        pomscale.sample(load(of_classes), [1], seeds=[0], size=(4, 8))


def test_without_prompts_they_are_asked_for(draw: Sample, tmp_path: Path) -> None:
    silent = save_text_picture_model(tmp_path / "silent", **WAYS["in context, later"])
    assert "say with --prompt what the pictures are to show" in draw(silent, expect=2)
    assert "1 prompts x 1" in draw(silent, "--prompt", "one left", "--num", "1")


def test_a_guide_is_of_the_same_texts(folder: Path, draw: Sample, tmp_path: Path) -> None:
    weaker = save_text_picture_model(tmp_path / "weaker", scale=0.05, **WAYS["in context"])
    draw(folder, "--num", "1", "--guide", weaker, "--npz", "guided.npz")
    draw(folder, "--num", "1", "--npz", "plain.npz")
    guided, plain = (np.load(tmp_path / f"{name}.npz")["images"] for name in ("guided", "plain"))
    assert not np.array_equal(guided, plain)
    of_classes = save_picture_model(tmp_path / "classes")
    assert "guide: its " in draw(folder, "--guide", of_classes, expect=2)
