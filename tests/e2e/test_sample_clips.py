"""`pomscale sample` of models of clips, as one types it: what is written, what goes on, and what is refused."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pomscale.cli import main
from pomscale.pretrained.load import PretrainedVDiPoM, load_pretrained
from pomscale.sampling.api import decode, sample
from pomscale.sampling.clips import num_latent_frames, start_frames
from support.make_video import write_video
from support.running import TIMEOUT_S, open_process, pomscale, run
from support.tiny_films import FPS, MAX_LENGTH, save_cogvideox_model, save_model, save_picture_model

av = pytest.importorskip("av")

TWO = ["--prompt", "three left", "--prompt", "one right"]

Sample = Callable[..., str]


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def maskless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("maskless"), temporal="none")


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    return save_cogvideox_model(tmp_path_factory.mktemp("cogvideox"))


@pytest.fixture
def film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sample:
    """`pomscale sample ...` in tmp_path; what it has said on stdout, or on stderr where it is to fail."""
    monkeypatch.chdir(tmp_path)

    def sample_here(*arguments: Any, expect: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["sample", *map(str, arguments)])
        said = capsys.readouterr()
        assert (ended.value.code or 0) == expect, said.err
        return said.err if expect else said.out + said.err

    return sample_here


def frames_of(path: Path) -> np.ndarray:
    """(f h w 3) uint8"""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_the_command_writes_clips_sheet_and_npz(causal: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("three left\n\none right\n")
    done = pomscale(
        "sample", causal, "--prompts", tmp_path / "prompts.txt", "--num", "3", "--frames", "8", "--seed", "5",
        "--out", tmp_path / "new" / "clips.mp4", "--sheet", tmp_path / "sheet.png", "--npz", tmp_path / "clips.npz",
        "--device", "cpu",
    )  # fmt: skip
    assert "6 clips of 8 frames" in done.stdout
    found = np.load(tmp_path / "clips.npz")
    assert found["clips"].shape == (6, 8, 20, 12, 3)
    assert found["prompts"].tolist() == ["three left"] * 3 + ["one right"] * 3
    assert found["seeds"].tolist() == [5, 6, 7, 8, 9, 10]

    frames = frames_of(tmp_path / "new" / "clips.mp4")
    height, width = 20 * 3 + 2, 12 * 3 + 2  # enlarged, with a gap
    assert frames.shape == (8, 2 * height + 2, 3 * width + 2, 3)
    with av.open(str(tmp_path / "new" / "clips.mp4")) as container:
        assert container.streams.video[0].average_rate == FPS
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * width + 2, 6 * height + 2)
        pixels = np.asarray(sheet)
    for clip in range(6):
        top, left = 2 + height * (clip // 3), 2 + width * (clip % 3)
        enlarged = found["clips"][clip].repeat(3, axis=1).repeat(3, axis=2)
        # Colours are stored at half the resolution: the mean is kept.
        in_film = frames[:, top : top + 60, left : left + 36]
        assert np.abs(in_film.mean((1, 2)) - enlarged.mean((1, 2))).max() < 3
        for column in range(8):
            tile = pixels[2 + height * clip :, 2 + width * column :][:60, :36]
            assert np.array_equal(tile, enlarged[column])


def test_clips_are_what_python_gives_and_grow_as_they_are_made_at_once(
    causal: Path, maskless: Path, film: Sample, tmp_path: Path
) -> None:
    """The recipe's own settings are the defaults, and the block-causal model gives the same frame by frame."""
    for model in (causal, maskless):
        film(model, *TWO, "--npz", "clips.npz", "--batch", "3", "--out", "clips.mp4")
        loaded = load_pretrained(model, device="cpu")
        prompts = ["three left"] * 2 + ["one right"] * 2
        clips = decode(loaded, sample(loaded, prompts, seeds=range(4), num_steps=2))
        expected = (clips.permute(0, 2, 3, 4, 1) * 255).round().byte().numpy()
        found = np.load(tmp_path / "clips.npz")["clips"]
        assert found.shape == (4, 6, 20, 12, 3)
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert found.std() > 10


def test_without_options_the_recipe_is_followed(film: Sample, tmp_path: Path) -> None:
    model = save_model(tmp_path, sampling={"prompts": ["a", "b", "c"], "num_each": 2, "num_frames": 4})
    assert "wrote clips.mp4, clips.npz: 6 clips of 4 frames" in film(model, "--npz", "clips.npz")
    assert np.load(tmp_path / "clips.npz")["prompts"].tolist() == ["a", "a", "b", "b", "c", "c"]


def test_a_folder_gets_a_file_per_clip_of_the_size_asked_for(causal: Path, film: Sample, tmp_path: Path) -> None:
    film(causal, *TWO, "--num", 1, "--size", "40x36", "--frames", 4, "--out", "clips", "--npz", "clips.npz")
    found = np.load(tmp_path / "clips.npz")["clips"]
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == ["0000.mp4", "0001.mp4"]
    for number, clip in enumerate(found):
        frames = frames_of(tmp_path / "clips" / f"{number:04d}.mp4")
        assert frames.shape == clip.shape == (4, 40, 36, 3)
        assert np.abs(frames.mean((1, 2)) - clip.mean((1, 2))).max() < 3


@pytest.mark.parametrize("model", ["causal", "cogvideox"])
def test_continued_clips_are_those_that_were_never_interrupted(
    model: str, film: Sample, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Twice, with guidance, two clips; with CogVideoX's decoder its past goes on too."""
    folder: Path = request.getfixturevalue(model)
    first, more = (4, 2) if model == "causal" else (16, 8)
    begin = [*TWO, "--num", 1, "--guidance", 1.5, "--sampler", "heun"]
    film(folder, *begin, "--frames", first + 2 * more, "--npz", "whole.npz", "--out", "whole.mp4")
    film(folder, *begin, "--frames", first, "--npz", "0.npz", "--save-state", "state", "--out", "0.mp4")
    for number in (1, 2):
        names = ["--npz", f"{number}.npz", "--out", f"{number}.mp4", "--save-state", "state"]
        film(folder, "--continue", "state", "--frames", more, *names)
    parts = [np.load(tmp_path / f"{number}.npz") for number in range(3)]
    whole = np.load(tmp_path / "whole.npz")
    assert [len(frames_of(tmp_path / f"{number}.mp4")) for number in range(3)] == [first, more, more]
    assert np.array_equal(np.concatenate([part["clips"] for part in parts], axis=1), whole["clips"])
    for part in parts:
        assert part["prompts"].tolist() == ["three left", "one right"]
        assert part["seeds"].tolist() == [0, 1]


def test_a_model_with_a_time_per_frame_group_goes_on_too(film: Sample, tmp_path: Path) -> None:
    model = save_model(tmp_path, per_frame_group=True)
    film(model, "--prompt", "x", "--frames", 8, "--npz", "whole.npz")
    film(model, "--prompt", "x", "--frames", 2, "--npz", "0.npz", "--save-state", "state")
    film(model, "--continue", "state", "--frames", 6, "--npz", "1.npz", "--out", "1.mp4")
    whole, *parts = (np.load(tmp_path / f"{name}.npz")["clips"] for name in ("whole", "0", "1"))
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize(
    "kind", [pytest.param({}, marks=pytest.mark.exhaustive), {"patch_frames": 1}], ids=["even", "odd"]
)
def test_what_ctrl_c_has_stopped_is_whole_and_can_be_gone_on_with(
    kind: dict[str, Any], film: Sample, tmp_path: Path
) -> None:
    """Also of a decoder that takes two latent frames at a time, and three at first if their number is odd."""
    model = save_cogvideox_model(tmp_path, **kind)
    asked = 4001 if kind else 4000
    command = [sys.executable, "-m", "pomscale", "sample", model, "--prompt", "x", "--num", 1, "--frames", asked]
    files = ["--npz", "0.npz", "--sheet", "sheet.png", "--save-state", "state", "--out", "0.mp4"]
    with open_process(
        [*map(str, command), *files], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        while not process.stderr.readline().startswith("frame groups: 1 of"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 75
    found = re.search(r"1 clips of (\d+) frames\nstopped by SIGINT: (\d+) frames are missing; .*--continue", said)
    assert found is not None, said
    made, missing = map(int, found.groups())
    assert made + missing == asked
    first = np.load(tmp_path / "0.npz")["clips"]
    assert len(frames_of(tmp_path / "0.mp4")) == first.shape[1] == made
    film(model, "--continue", "state", "--frames", 8, "--npz", "1.npz", "--out", "1.mp4")
    film(model, "--prompt", "x", "--num", 1, "--frames", made + 8, "--npz", "whole.npz")
    whole, more = (np.load(tmp_path / f"{name}.npz")["clips"] for name in ("whole", "1"))
    assert np.array_equal(np.concatenate([first, more], axis=1), whole)


@pytest.mark.parametrize("model", ["causal", "maskless"])
def test_clips_begin_with_a_picture_or_a_clip(
    model: str, film: Sample, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    picture = np.random.default_rng(0).integers(0, 256, (20, 12, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "start.png")
    film(folder, *TWO, "--num", 1, "--from", "start.png", "--npz", "moved.npz", "--frames", 6)
    moved = np.load(tmp_path / "moved.npz")["clips"]
    assert np.array_equal(moved[:, 0], np.stack([picture] * 2))
    assert not np.array_equal(moved[:, 1], moved[:, 0])

    greys = [np.full((40, 36, 3), 40 * number, np.uint8) for number in range(1, 6)]
    write_video(tmp_path / "start.mp4", greys, FPS)
    film(folder, *TWO, "--from", "start.mp4", "--frames", 10, "--npz", "longer.npz", "--num", 1, "--size", "40x36")
    longer = np.load(tmp_path / "longer.npz")["clips"]
    assert longer.shape == (2, 10, 40, 36, 3)
    assert np.abs(longer[:, :5].astype(int) - np.stack(greys)).max() <= 2
    assert not np.array_equal(longer[0, 5], longer[1, 5]), "half of a frame group was given, the other half is made"


def test_a_picture_begins_a_clip_of_cogvideox(cogvideox: Path, film: Sample, tmp_path: Path) -> None:
    """Its first latent frame stands for four frames of the still picture."""
    model = load_pretrained(cogvideox, device="cpu")
    assert isinstance(model, PretrainedVDiPoM)
    assert start_frames(model, 24) == [8, 16, 24]
    Image.fromarray(np.full((40, 24, 3), 200, np.uint8)).save(tmp_path / "start.png")
    film(cogvideox, "--prompt", "x", "--frames", 16, "--num", 1, "--npz", "free.npz")
    film(cogvideox, "--prompt", "x", "--frames", 16, "--num", 1, "--npz", "moved.npz", "--from", "start.png")
    free, moved = (np.load(tmp_path / f"{name}.npz")["clips"] for name in ("free", "moved"))
    assert moved.shape == (1, 16, 40, 24, 3)
    assert not np.array_equal(free, moved)
    film(cogvideox, "--prompt", "x", "--frames", 8, "--num", 1, "--from", "start.png")
    assert len(frames_of(tmp_path / "clips.mp4")) == 8


def test_a_long_prompt_is_cut_and_it_is_told(causal: Path, film: Sample, tmp_path: Path) -> None:
    cut = "y" * (MAX_LENGTH - 1)  # bytes, and the end token
    said = film(causal, "--prompt", cut + "zzz", "--num", 1, "--npz", "long.npz")
    assert said.count("warning") == 1
    assert f"{MAX_LENGTH + 3} tokens" in said
    assert "the last 3 are left out" in said
    assert "warning" not in film(causal, "--prompt", cut, "--num", 1, "--npz", "cut.npz")
    long, short = (np.load(tmp_path / f"{name}.npz")["clips"] for name in ("long", "cut"))
    assert np.array_equal(long, short)


def test_each_long_prompt_is_told_once(maskless: Path, film: Sample) -> None:
    """Also by a model that makes its clips in several batches."""
    said = film(maskless, "--prompt", "y" * MAX_LENGTH, "--num", 3, "--batch", 1, "--steps", 1)
    assert said.count("warning") == 1


def test_positions_that_were_never_seen_are_told_of_clips_made_at_once(
    film: Sample, tmp_path: Path, maskless: Path
) -> None:
    num_seen = 2 * (3 + 100)  # frames of clips, and of the frame groups that they may begin later
    more = ["--prompt", "x", "--num", 1, "--steps", 1]
    assert "warning" not in film(maskless, *more, "--frames", num_seen)
    said = film(maskless, *more, "--frames", num_seen + 2)
    assert said.count("warning") == 1
    assert "frame groups 0 to 102" in said


def test_what_of_a_given_clip_is_left_out_is_told(cogvideox: Path, film: Sample, tmp_path: Path) -> None:
    """CogVideoX takes 8 frames at a time: the clip goes on from the 16th of 20."""
    greys = [np.full((40, 24, 3), 10 * number, np.uint8) for number in range(20)]
    command = ["--prompt", "x", "--num", 1, "--frames", 24, "--from", "start.mp4"]
    write_video(tmp_path / "start.mp4", greys, FPS)
    said = film(cogvideox, *command)
    assert said.count("warning") == 1
    assert "--from start.mp4: the clips continue its first 16 of 20 frames" in said
    write_video(tmp_path / "start.mp4", greys[:16], FPS)
    assert "warning" not in film(cogvideox, *command)


def test_prompts_as_windows_writes_them(causal: Path, film: Sample, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfthree left\r\none right\r\n")
    film(causal, "--prompts", "prompts.txt", "--num", 1, "--npz", "clips.npz")
    assert np.load(tmp_path / "clips.npz")["prompts"].tolist() == ["three left", "one right"]


def test_frames_that_do_not_fit_name_the_nearest(causal: Path, cogvideox: Path, film: Sample) -> None:
    assert "the nearest that fit are 6 or 8" in film(causal, *TWO, "--frames", 7, expect=2)
    assert "the nearest that fit are 2" in film(causal, *TWO, "--frames", 1, expect=2)
    assert "the nearest that fit are 16 or 24" in film(cogvideox, *TWO, "--frames", 20, expect=2)
    model = load_pretrained(cogvideox, device="cpu")
    assert isinstance(model, PretrainedVDiPoM)
    assert num_latent_frames(model, 80) == 20
    assert num_latent_frames(model, None) == 6


def test_odd_numbers_of_latent_frames(film: Sample, tmp_path: Path) -> None:
    """Frame groups of one latent frame: 9 frames are 3 of them, 3 in the first batch, and go on in twos."""
    model = save_cogvideox_model(tmp_path, patch_frames=1)
    assert "nearest that fit are 9 or 16" in film(model, "--prompt", "x", "--frames", 12, expect=2)
    film(model, "--prompt", "x", "--frames", 17, "--npz", "whole.npz", "--num", 1)
    film(model, "--prompt", "x", "--frames", 9, "--npz", "0.npz", "--num", 1, "--save-state", "state")
    more = ["--continue", "state", "--out", "1.mp4"]
    assert "nearest that fit are 8" in film(model, *more, "--frames", 4, expect=2)
    film(model, *more, "--frames", 8, "--npz", "1.npz")
    whole, *parts = (np.load(tmp_path / f"{name}.npz")["clips"] for name in ("whole", "0", "1"))
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_what_does_not_fit_the_model_is_one_clear_error(
    causal: Path, maskless: Path, film: Sample, tmp_path: Path
) -> None:
    film(causal, *TWO, "--frames", 2, "--save-state", "state", "--num", 1)
    Image.fromarray(np.zeros((20, 12, 3), np.uint8)).save(tmp_path / "start.png")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (12, 20)).save(tmp_path / "start.bmp")
    more = ["--frames", "2", "--out", "more.mp4"]
    for arguments, message in [
        ([causal, "--classes", "0"], "--classes: not for .*, which makes clips: describe with --prompt"),
        ([causal], "say with --prompt what the clips are to show"),
        ([causal, "--prompts", "nowhere.txt"], "--prompts nowhere.txt: cannot be read"),
        ([causal, "--prompts", "empty.txt"], "--prompts empty.txt: holds no prompt"),
        ([causal, *TWO, "--out", "grid.png"], r"--out grid\.png: clips are written to a file \.mp4"),
        ([causal, *TWO, "--out", "start.png/clips.mp4"], "start.png: this folder cannot be made"),
        ([causal, *TWO, "--size", "40"], "--size '40': give height and width"),
        ([causal, *TWO, "--size", "42x36"], "multiples of 4 pixels; the nearest is 4[04]x36"),
        ([causal, *TWO, "--from", "nowhere.png"], r"--from nowhere\.png: cannot be read"),
        ([causal, *TWO, "--from", "text.png"], r"--from text\.png: no PNG, JPEG or WebP picture"),
        ([causal, *TWO, "--from", "state"], "--from state: no video that can be read"),
        (
            [causal, *TWO, "--from", "clips.mp4", "--frames", "2"],
            "--from: the frames given are as many as the clips have",
        ),
        ([causal, "--continue", "state"], "--continue: give the number of further frames with --frames"),
        ([causal, "--continue", "state", "--frames", "2"], "--continue: name the file for them with --out"),
        (
            [causal, "--continue", "state", *TWO, "--frames", "2", "--guidance", "0", "--eta", "1"],
            "--prompt, --eta, --guidance: not with --continue",
        ),
        ([causal, "--continue", "start.png", *more], r"start\.png: .*no state of clips"),
        ([maskless, "--continue", "state", *more], "reads all frames at once"),
        ([causal, *TWO, "--from", "start.bmp"], r"--from start\.bmp: no video .*pictures are \.png"),
        ([maskless, *TWO, "--save-state", "other"], "--save-state: this model makes all frames at once"),
        ([causal, *TWO, "--text-path", tmp_path / "nowhere"], r"text\.path: cannot load"),
    ]:
        said = film(*arguments, expect=2)
        assert said.startswith("error: "), said
        assert re.search(message, said), said


def test_a_seed_beyond_those_of_the_keys_is_refused(causal: Path, film: Sample) -> None:
    assert "must lie between -2**62 and 2**62" in film(causal, *TWO, "--seed", 2**63, expect=2)


def test_the_state_of_another_model_is_refused(causal: Path, film: Sample, tmp_path: Path) -> None:
    film(causal, *TWO, "--frames", 2, "--save-state", "state", "--num", 1)
    other = save_model(tmp_path, depth=1)
    said = film(other, "--continue", "state", "--frames", 2, "--out", "more.mp4", expect=2)
    assert "are of another model" in said


def test_options_of_clips_are_refused_for_pictures(film: Sample, tmp_path: Path) -> None:
    model = save_picture_model(tmp_path / "pictures")
    film(model, "--num", 1, "--steps", 1)
    assert (tmp_path / "grid.png").exists()
    said = film(model, *TWO, "--frames", 2, "--from", "grid.png", "--sheet", "sheet.png", expect=2)
    assert "--prompt, --frames, --sheet, --from: not for" in said
    assert "which makes pictures" in said


@pytest.mark.parametrize("option", ["--out", "--sheet", "--npz", "--save-state"])
def test_a_file_that_cannot_be_written_is_one_clear_error_before_the_work(
    causal: Path, film: Sample, tmp_path: Path, option: str
) -> None:
    place = tmp_path / "taken.mp4"
    place.mkdir()
    said = film(causal, "--prompt", "x", "--frames", 2, option, place, expect=2)
    assert said == f"error: {place}: is a folder; name a file\n"
    assert list(tmp_path.rglob("*")) == [place]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_frames(causal: Path, tmp_path: Path) -> None:
    """90 frame groups more, whose frames alone are 30 MiB."""
    code = (
        "import resource; from pomscale.cli import main\ntry: main()\nfinally: print(resource.getrusage(0).ru_maxrss)"
    )
    peaks_mib = []
    for num_frames in (60, 240):
        arguments = ["--prompt", "x", "--num", "1", "--size", "120x120", "--steps", "1", "--frames", str(num_frames)]
        command = [sys.executable, "-c", code, "sample", str(causal), *arguments, "--sheet", "sheet.png"]
        peaks_mib.append(int(run(command, 0, cwd=tmp_path).stdout.split()[-1]) / 1024)
        assert len(frames_of(tmp_path / "clips.mp4")) == num_frames
    assert peaks_mib[1] - peaks_mib[0] < 20, peaks_mib
