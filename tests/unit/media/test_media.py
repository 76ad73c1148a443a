"""Pictures and clips as files, read back."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pomscale.base.errors import InputError, PomscaleError
from pomscale.media.sheets import ContactSheet, open_clips, save_clips, save_grid

av = pytest.importorskip("av")
Colorspace = pytest.importorskip("av.video.reformatter").Colorspace


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("as_torch", [True, False])
def test_small_pictures_are_enlarged_and_laid_out_row_by_row(tmp_path: Path, channels: int, as_torch: bool) -> None:
    images = np.zeros((5, channels, 8, 8), np.float32)
    images[3] = 1.0
    images[4] = 7.0  # out of range: clipped
    save_grid(torch.from_numpy(images) if as_torch else images, tmp_path / "new" / "grid.png", num_columns=3)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape[:2] == (2 * 34 + 2, 3 * 34 + 2)
    centres = [grid[18 + 34 * (i // 3), 18 + 34 * (i % 3)].max() for i in range(6)]
    assert centres == [0, 0, 0, 255, 255, 255]  # the sixth is background


def test_large_pictures_keep_their_size(tmp_path: Path) -> None:
    save_grid(np.zeros((1, 3, 40, 50), np.float32), tmp_path / "grid.png", num_columns=1)
    assert Image.open(tmp_path / "grid.png").size == (54, 44)


def grey_clips(num_clips: int, num_frames: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    """Every frame of one grey: clip n, frame f has n / 8 + f / 64."""
    greys = torch.arange(num_clips)[:, None] / 8 + torch.arange(num_frames)[None] / 64
    return greys[:, None, :, None, None].expand(-1, channels, -1, height, width)


def write_clip(path: Path, chunks: Iterable[torch.Tensor]) -> None:
    with open_clips(path, 8) as writer:
        for chunk in chunks:
            writer.write(chunk)


def read_mp4(path: Path) -> tuple[np.ndarray, Fraction]:
    """Frames (f h w 3) uint8, and frames per second as its times have it, which have to be even."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    times = [frame.pts * frame.time_base for frame in frames]
    (gap,) = {later - earlier for earlier, later in pairwise(times)}
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), 1 / gap


@pytest.mark.parametrize("fps", [8.0, 16.0, 30000 / 1001, 12.5])
def test_an_mp4_has_the_frames_and_the_rate(tmp_path: Path, fps: float) -> None:
    clips = grey_clips(1, 20, 40, 50)
    with open_clips(tmp_path / "new" / "clip.mp4", fps) as writer:
        for chunk in clips.split([8, 0, 1, 11], dim=2):
            writer.write(chunk)
    frames, rate = read_mp4(tmp_path / "new" / "clip.mp4")
    assert frames.shape == (20, 40, 50, 3)
    assert float(rate) == pytest.approx(fps)
    assert np.abs(frames - clips[0].movedim(0, -1).numpy() * 255).max() < 3
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "clip.mp4"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (33, 35), (1, 12)])
def test_small_and_odd_sizes(tmp_path: Path, size: tuple[int, int], channels: int) -> None:
    clips = grey_clips(1, 3, *size, channels)
    with open_clips(tmp_path / "clip.mp4", 8) as writer:
        writer.write(clips)
    frames, _ = read_mp4(tmp_path / "clip.mp4")
    factor = -(-32 // min(size))
    assert frames.shape[1:3] == tuple(side * factor + side * factor % 2 for side in size)
    for frame, grey in zip(frames, clips[0, 0, :, 0, 0] * 255, strict=True):
        # Beside a white pixel of padding the colours are shared.
        assert np.abs(frame[: size[0] * factor - 2, : size[1] * factor - 2] - grey.item()).max() < 4


def test_colours_come_back(tmp_path: Path) -> None:
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0.2, 0.4, 0.8]])
    with open_clips(tmp_path / "clip.mp4", 8) as writer:
        writer.write(colours.T[None, :, :, None, None].expand(-1, -1, -1, 32, 32))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.colorspace == Colorspace.ITU601
    frames, _ = read_mp4(tmp_path / "clip.mp4")
    assert np.abs(frames.mean((1, 2)) - colours.numpy() * 255).max() < 4


def test_several_clips_lie_side_by_side_and_in_a_sheet(tmp_path: Path) -> None:
    clips = grey_clips(3, 20, 40, 50)
    save_clips(clips, tmp_path / "clips.mp4", tmp_path / "sheet.png", num_columns=2, fps=16)
    frames, _ = read_mp4(tmp_path / "clips.mp4")
    assert frames.shape == (20, 2 * 42 + 2, 2 * 52 + 2, 3)
    for number in range(4):
        expected = 255 if number == 3 else (number / 8 + 19 / 64) * 255
        assert abs(float(frames[19, 22 + 42 * (number // 2), 27 + 52 * (number % 2), 0]) - expected) < 3

    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (3 * 42 + 2, 8 * 52 + 2, 3)
    shown = [0, 3, 5, 8, 11, 14, 16, 19]
    for number in range(3):
        greys = [int(sheet[22 + 42 * number, 27 + 52 * column, 0]) for column in range(8)]
        assert greys == [round((number / 8 + frame / 64) * 255) for frame in shown]


@pytest.mark.parametrize("num_frames", [1, 5, 8, 9, 1000])
def test_a_sheet_keeps_only_what_it_shows(tmp_path: Path, num_frames: int) -> None:
    """Numbers of frames as 16-bit colours; added in chunks that do not divide them."""
    numbers = torch.arange(num_frames)
    colours = torch.stack([numbers // 256, numbers % 256, numbers * 0]) / 255
    sheet = ContactSheet(num_frames)
    for chunk in colours[None, :, :, None, None].expand(-1, -1, -1, 32, 32).split(7, dim=2):
        sheet.add(chunk)
    sheet.save(tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    columns = pixels[16, 16::34]
    shown = columns[:, 0] * 256 + columns[:, 1]
    assert len(shown) == min(num_frames, 8)
    assert shown[0] == 0
    assert shown[-1] == num_frames - 1
    gaps = np.diff(shown)
    assert len(shown) == 1 or gaps.max() - gaps.min() <= 1


def test_what_a_killed_process_has_written_can_be_played(tmp_path: Path) -> None:
    """Ten seconds, so that several fragments are on disk; the encoder holds the last frames back."""
    code = """
import os, signal, sys, torch
from pathlib import Path
from pomscale.media.sheets import open_clips
with open_clips(Path(sys.argv[1]) / "clip.mp4", 8) as writer:
    for grey in range(200):
        writer.write(torch.full((1, 3, 1, 32, 32), grey / 255))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=120)
    assert died.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("clip.mp4.")
    frames, _ = read_mp4(left)
    assert len(frames) > 50
    assert np.abs(frames[:, 16, 16, 0] - np.arange(len(frames))).max() < 4


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    """The kernel refuses files of more than 20 kB: in the middle of a clip, at its very end, and for a sheet."""
    noise = torch.rand(1, 3, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for num_chunks in (4, 1):
            with pytest.raises(PomscaleError, match=r"cannot write .*clip\.mp4: .*File too large.*make room"):
                write_clip(tmp_path / "clip.mp4", noise.split(64 // num_chunks, dim=2))
        with pytest.raises(PomscaleError, match=r"cannot write .*sheet\.png"):
            save_grid(noise[0].transpose(0, 1), tmp_path / "sheet.png", num_columns=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(PomscaleError, match=r"cannot write .*clip\.mp4"):
        write_clip(tmp_path / "clip.mp4", [torch.zeros(1, 3, 2, 32, 32)])
    assert list(tmp_path.iterdir()) == [tmp_path / "clip.mp4"]


def test_an_error_while_filming_leaves_the_older_clip(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_text("older")
    chunks = (torch.zeros(1, 3, 2, 32, 32 // (1 - number)) for number in range(2))
    with pytest.raises(ZeroDivisionError):
        write_clip(path, chunks)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_without_pyav_the_command_is_told_and_pictures_need_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("mp4", "pyav"):
        monkeypatch.delitem(sys.modules, f"pomscale.media.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "av", None)
    save_grid(np.zeros((1, 3, 40, 50), np.float32), tmp_path / "grid.png", num_columns=1)
    with pytest.raises(InputError, match=r"package av: .*pip install -e '\.\[video\]'"):
        save_clips(torch.zeros(1, 3, 2, 8, 8), tmp_path / "a.mp4", tmp_path / "a.png", num_columns=1, fps=8)


def test_many_clips_can_be_written_at_once(tmp_path: Path) -> None:
    """x264 takes a thread and a half per core for each, and the memory for as many frames: 64 clips would take all."""
    frames = torch.rand(1, 3, 4, 64, 96)
    num_before = len(list(Path("/proc/self/task").iterdir()))
    with ExitStack() as stack:
        for number in range(8):
            stack.enter_context(open_clips(tmp_path / f"{number}.mp4", 8)).write(frames)
        num_more = len(list(Path("/proc/self/task").iterdir())) - num_before
    assert num_more <= 8


def test_a_folder_that_cannot_be_made_is_an_error_that_training_knows(tmp_path: Path) -> None:
    """An OSError would end the run: events.py goes on after what PomscaleError tells of."""
    (tmp_path / "samples").write_text("a file where the folder should be")
    path = tmp_path / "samples" / "grid.png"
    with pytest.raises(PomscaleError, match="samples: this folder cannot be made"):
        save_grid(np.zeros((1, 1, 4, 4)), path, 1)
    with pytest.raises(PomscaleError, match="samples: this folder cannot be made"):
        save_clips(torch.zeros(1, 1, 2, 4, 4), path.with_suffix(".mp4"), path, num_columns=1, fps=8)
