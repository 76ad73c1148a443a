"""`evaluate images` of a model of clips: prompts and frames are obeyed, once, in sweeps and over checkpoints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from launch.pipelines import checkpoints
from pomscale.base.errors import InputError
from pomscale.cli import _parser
from support.generated_clips import make_clips, save_i3d, write_clip_folder
from support.generated_pictures import make_pixels, write_folder
from support.tiny_films import save_model

OPTIONS = "--reference real --extractor torchscript:i3d.pt --measured-frames 3 --steps 1 --num-samples 5 --device cpu"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Clips, a network of clips, prompts and a model, all in the folder of the command."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path)
    save_i3d(tmp_path / "i3d.pt")
    write_clip_folder(tmp_path / "real", make_clips(7))
    write_folder(tmp_path / "pictures", make_pixels(12))
    (tmp_path / "prompts.txt").write_text("red\n\nblue\n")
    return tmp_path


def call(words: str) -> int:
    arguments = _parser().parse_args(["evaluate", "images", *shlex.split(words)])
    return int(arguments.run(arguments))


def test_prompts_of_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"model {OPTIONS} --prompts prompts.txt --prompt 'a green bar' --frames 4 --size 16x12 --work w"
    with pytest.raises(InputError, match="reference real of 20x12"):
        call(words)
    assert call(f"{words} --fit 16x12 --json out.json") == 0
    result = json.loads((folder / "out.json").read_text())
    assert result["metrics"].keys() == {"fvd"}
    assert result["settings"]["drawn"]["prompts"]["number"] == 3
    assert result["settings"]["drawn"]["frames"] == 4
    assert result["settings"]["frames"] == {"number": 3, "stride": 1, "fps": 8.0, "size": [16, 12]}
    assert result["parts"] == {"part": None, "batch": 8}
    assert "source: 5 clips" in capsys.readouterr().out


def test_a_sweep_over_guidance(folder: Path) -> None:
    assert call(f"model {OPTIONS} --prompts prompts.txt --sweep guidance=0,2 --work w") == 0
    rows = json.loads((folder / "w" / "sweep.json").read_text())
    first, second = (row["metrics"]["fvd"] for row in rows)
    assert first != second
    assert [row["settings"]["drawn"]["prompts"]["number"] for row in rows] == [2, 2]
    with pytest.raises(InputError, match="holds a sweep with another --prompts"):
        call(f"model {OPTIONS} --prompts others.txt --sweep guidance=0,2 --work w")


def test_prompts_go_along_to_every_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Asked:
        def __init__(self, *arguments: Any, check: Any) -> None:
            asked.append(arguments)

        def follow(self) -> int:
            return 0

    monkeypatch.setattr(checkpoints, "CheckpointEvaluation", Asked)
    call("model --reference real --prompts 'my prompts.txt' --prompt {x} --every 100 --cluster local")
    (command,) = asked[0][1].run
    words = [word.format(checkpoint="C", folder="F") for word in shlex.split(command)]
    assert words[:9] == [
        *["evaluate", "images", "C", "--reference", "real", "--prompts", "my prompts.txt", "--prompt", "{x}"]
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("real --prompt a", "--prompt: only where a model draws by prompts"),
        ("real --labels none", "--labels: only where a model draws pictures"),
        ("real --steps 3", "--num-steps: only where a model draws pictures or clips"),
        ("model --prompt a --fps 8", "--fps: only where clips lie in files or tars"),
        ("pictures --measured-frames 4 --extractor digits", "--measured-frames: only where clips are measured"),
        ("real --fit 8xx", "--fit '8xx': give a side in pixels"),
        ("model --prompts nowhere.txt", "--prompts nowhere.txt: cannot be read as text"),
        ("model --prompt a --size 15x12", "--size 15x12: this model makes multiples of 4 pixels"),
        ("model --prompt a --frames 5", "--frames 5: frames come 2 latent frames at a time"),
    ],
)
def test_options_that_nothing_obeys_are_refused(folder: Path, words: str, message: str) -> None:
    if "--extractor" not in words:
        words += " --extractor torchscript:i3d.pt --measured-frames 3"
    with pytest.raises(InputError, match=message):
        call(f"{words} --write-statistics s.npz --dry-run")
