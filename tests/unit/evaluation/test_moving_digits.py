"""The world of the moving digits, and the measure that judges clips by it."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")
pytest.importorskip("av")

from data_pipelines.demos import moving_digits
from data_pipelines.demos.moving_digits import NAMES, VELOCITIES, World, write_moving_digits
from pomscale.base.errors import InputError
from pomscale.cli import main
from pomscale.evaluation.moving_digits import digit_of, directions_of, evaluate_moving_digits

LARGE = World(digits=(3, 7), directions=("left", "right", "up", "down"), height=12, width=14, num_frames=9, speed=2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moving-digits")
    write_moving_digits(folder, World(), {"train": 60, "heldout": 300})
    return folder


def scans_of(folder: Path, half: str, world: World) -> dict[int, list[np.ndarray]]:
    return {
        digit: [np.asarray(Image.open(file)) for file in sorted((folder / "digits" / half / str(digit)).glob("*.png"))]
        for digit in world.digits
    }


@pytest.mark.parametrize("direction", VELOCITIES)
def test_digits_come_back_in_at_the_other_side(direction: str) -> None:
    scan = np.arange(1, 65, dtype=np.uint8).reshape(8, 8)
    clip = LARGE.clip(scan, (10, 6), direction)
    assert (np.sort(clip.reshape(len(clip), -1)) == np.sort(clip[0].ravel())).all()  # nothing is lost at the border
    down, right = VELOCITIES[direction]
    for frame, pixels in enumerate(clip):
        row, column = np.argwhere(pixels == scan[0, 0])[0]
        assert (row, column) == ((10 + 2 * frame * down) % 12, (6 + 2 * frame * right) % 14)


def test_every_caption_is_as_frequent_and_true(clips: Path) -> None:
    world = World()
    scans = scans_of(clips, "train", world)
    drawn = [world.draw(index, 0, scans) for index in range(60)]
    assert Counter(caption for _, caption in drawn) == dict.fromkeys(world.captions, 6)
    starts = set()
    for clip, caption in drawn:
        digit, _, direction = caption.split()
        assert directions_of(clip / 255) == (direction, [direction] * 7)
        known = scans[NAMES.index(digit)]
        assert any((np.roll(clip[0], -start, 1)[:, :8] == scan).all() for scan in known for start in range(16))
        starts.add(int(np.argmax(clip[0].sum(0))))
    assert len(starts) >= 8  # they start anywhere


def test_both_halves_show_scans_of_their_own(clips: Path) -> None:
    world = World()
    train, heldout = (scans_of(clips, half, world) for half in ("train", "heldout"))
    for digit in world.digits:
        assert not {scan.tobytes() for scan in train[digit]} & {scan.tobytes() for scan in heldout[digit]}


def test_a_stopped_step_goes_on_to_the_same_files(clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(clips, folder)
    (folder / "train" / "000007.mp4").unlink()
    (folder / "train" / "000009.mp4").unlink()
    (folder / "train" / "000009.txt").unlink()
    (folder / "train" / "000011.part").write_bytes(b"cut off")
    kept = (folder / "train" / "000008.mp4").stat().st_mtime_ns
    write_moving_digits(folder, World(), {"train": 60, "heldout": 300})
    assert (folder / "train" / "000008.mp4").stat().st_mtime_ns == kept
    for file in sorted(clips.rglob("*.[mt][px][4t]")):
        assert (folder / file.relative_to(clips)).read_bytes() == file.read_bytes(), file


def test_another_world_is_not_mixed_in(clips: Path) -> None:
    with pytest.raises(InputError, match=r"holds the clips of another world.*remove it"):
        write_moving_digits(clips, World(speed=2), {"train": 60})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"digits": (3, 10)}, r"--digits: give some of 0 to 9, got \[3, 10\]"),
        ({"directions": ("left", "north")}, r"--directions: give some of left, right, up, down"),
        ({"directions": ("left", "down")}, r"a canvas of 8x16 is too small .* left and down"),
        ({"width": 7}, r"a canvas of 8x7 is too small"),
        ({"speed": 0}, r"--speed: give at least 1, got 0"),
    ],
)
def test_worlds_that_cannot_be(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        World(**changes)


def test_the_command_makes_the_world_that_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["moving_digits", str(tmp_path / "out")]
    options = ["--digits", "3", "--directions", "up", "--height", "16", "--train", "2", "--heldout", "1"]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    assert moving_digits.main() == 0
    assert "train: 2 clips of 8 frames, 16x16 pixels" in capsys.readouterr().out
    assert (tmp_path / "out" / "train" / "000001.txt").read_text() == "three moving up\n"
    monkeypatch.setattr(sys, "argv", [*command, "--digits", "two"])
    assert moving_digits.main() == 2
    assert "--digits" in capsys.readouterr().err


@pytest.mark.parametrize("direction", VELOCITIES)
def test_a_track_is_followed_over_the_border_and_backwards(direction: str) -> None:
    scan = np.zeros((8, 8), np.uint8)
    scan[2:6, 3:5] = 200
    clip = LARGE.clip(scan, (8, 8), direction) / 255
    assert directions_of(clip) == (direction, [direction] * 8)
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[direction]
    assert directions_of(clip[::-1]) == (opposite, [opposite] * 8)
    assert directions_of(clip[[0, 1, 2, 1, 2, 3]]) == (direction, [direction] * 2 + [opposite] + [direction] * 2)


def test_a_digit_is_cut_out_wherever_it_is() -> None:
    scan = np.zeros((8, 8))
    scan[1:7, 2:6] = 1.0
    for start in range(12):
        frame = np.zeros((12, 12))
        frame[:8, :8] = scan
        np.testing.assert_array_equal(digit_of(np.roll(frame, (start, 5 * start), (0, 1))), scan)


def write_npz(path: Path, folder: Path, prompts: list[str], count: int = 60) -> Path:
    """Real clips of the training half, said to be generated of these prompts."""
    scans = scans_of(folder, "train", World())
    drawn = [World(num_frames=24).draw(index, 0, scans) for index in range(count)]
    generated = np.stack([clip for clip, _ in drawn])[..., None]
    np.savez(path, clips=generated, prompts=np.array(prompts or [caption for _, caption in drawn]), seeds=range(count))
    return path


def test_real_clips_are_the_ceiling_and_wrong_ones_are_found(clips: Path, tmp_path: Path) -> None:
    halves = (clips / "train", clips / "heldout")
    real = evaluate_moving_digits(write_npz(tmp_path / "real.npz", clips, []), *halves)
    assert (real.num_generated, real.num_frames_generated, real.num_frames_real) == (60, 24, 8)
    assert min(real.digit_generated, real.digit_real) > 0.94
    assert (real.direction_generated, real.direction_real, real.steps_generated, real.steps_real) == (1, 1, 1, 1)
    assert list(real.by_prompt) == sorted(World().captions)
    assert '"four moving left"' in real.table()
    asked = ["zero moving left"] * 60
    wrong = evaluate_moving_digits(write_npz(tmp_path / "wrong.npz", clips, asked), *halves)
    assert wrong.digit_generated == pytest.approx(1 / 5, abs=0.05)  # a fifth of the clips show a zero
    assert wrong.direction_generated == 0.5


def test_noise_is_not_recognised(clips: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (300, 24, 8, 16, 1), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", clips=noise, prompts=np.array(World().captions * 30), seeds=range(300))
    report = evaluate_moving_digits(tmp_path / "noise.npz", clips / "train", clips / "heldout")
    assert report.digit_generated < 0.4
    assert report.direction_generated < 0.65


def test_the_evaluate_command(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    npz = write_npz(tmp_path / "real.npz", clips, [])
    folders = ["--train", str(clips / "train"), "--heldout", str(clips / "heldout")]
    with pytest.raises(SystemExit) as done:
        main(["evaluate", "moving-digits", str(npz), *folders, "--out", str(tmp_path / "figures.json")])
    assert done.value.code == 0
    assert "direction asked for" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["direction_generated"] == 1.0


@pytest.mark.parametrize("which", ["npz", "folder", "digit", "canvas"])
def test_evaluation_of_the_wrong_thing(clips: Path, tmp_path: Path, which: str) -> None:
    folders = [clips / "train", clips / "heldout"]
    npz = tmp_path / "clips.npz"
    shape = (1, 24, 12, 16, 1) if which == "canvas" else (1, 24, 8, 16, 1)
    prompt = "five moving left" if which == "digit" else "one moving left"
    np.savez(npz, clips=np.zeros(shape, np.uint8), prompts=np.array([prompt]), seeds=[0])
    told = {
        "npz": r"not a file of `pomscale sample --npz`",
        "folder": r"no clips here; write them: python -m data_pipelines\.demos\.moving_digits",
        "digit": r"asks for \['five'\]",
        "canvas": r"frames of \(64, 128\) are no multiple of the generated ones, \(12, 16\)",
    }[which]
    if which == "npz":
        np.savez(npz, images=np.zeros(3))
    if which == "folder":
        folders[1] = tmp_path
    with pytest.raises(InputError, match=told):
        evaluate_moving_digits(npz, *folders)
