"""Write clips that need no download: handwritten digits that move over a small canvas and re-enter on its other side.

    python -m data_pipelines.demos.moving_digits data/moving-digits

OUT/train and OUT/heldout receive NAME.mp4 and NAME.txt ("three moving left"). They show different scans of
scikit-learn's digits, which OUT/digits receives as PNGs. Frame k shows the scan moved by k times `speed` pixels from
its first position, rows and columns modulo the canvas. Run again after a stop, the command writes the missing clips.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipelines.demos.digits import NAMES, write_digits
from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import write_text
from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.media.pictures import read_grey

VELOCITIES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows and columns

FPS = 8
_DIGIT = 8  # side of a scan, in pixels

# A pixel of the canvas is a square of _ZOOM x _ZOOM in the file, since video codecs take no smaller pictures. The area
# filter of the encode step takes the mean of each square, so artefacts of the compression at its edges vanish.
_ZOOM = 8
_CRF = 12  # x264's constant rate factor; 18 is said to look lossless


@dataclass(frozen=True)
class World:
    """Parameters of the clips. InputError if they allow none, or if a digit cannot move for want of space."""

    digits: tuple[int, ...] = (0, 1, 2, 3, 4)
    directions: tuple[str, ...] = ("left", "right")
    height: int = 8
    width: int = 16
    num_frames: int = 8
    speed: int = 4  # pixels per frame
    grid: int = 2  # first positions are multiples of so many pixels
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.digits or not set(self.digits) <= set(range(len(NAMES))):
            raise InputError(f"--digits: give some of 0 to 9, got {list(self.digits)}")
        if not self.directions or not set(self.directions) <= VELOCITIES.keys():
            raise InputError(f"--directions: give some of {', '.join(VELOCITIES)}, got {list(self.directions)}")
        for name in ("num_frames", "speed", "grid"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}: give at least 1, got {getattr(self, name)}")
        for axis, side in enumerate((self.height, self.width)):
            moving = [direction for direction in self.directions if VELOCITIES[direction][axis]]
            if side < _DIGIT or (side == _DIGIT and moving):
                raise InputError(
                    f"--height, --width: a canvas of {self.height}x{self.width} is too small for digits of "
                    f"{_DIGIT}x{_DIGIT} that move {' and '.join(self.directions)}"
                )

    @property
    def captions(self) -> list[str]:
        return [_caption(digit, direction) for digit, direction in itertools.product(self.digits, self.directions)]

    def clip(self, scan: np.ndarray, start: tuple[int, int], direction: str) -> np.ndarray:
        """Return (f, h, w) uint8 of a scan (8, 8) whose upper left corner is at `start` = (row, column) in frame 0."""
        canvas = np.zeros((self.height, self.width), np.uint8)
        canvas[:_DIGIT, :_DIGIT] = scan
        down, right = (self.speed * step for step in VELOCITIES[direction])
        return np.stack(
            [
                np.roll(canvas, (start[0] + frame * down, start[1] + frame * right), (0, 1))
                for frame in range(self.num_frames)
            ]
        )

    def draw(self, index: int, half: int, scans: dict[int, list[np.ndarray]]) -> tuple[np.ndarray, str]:
        """Return clip number `index` of a half (f, h, w) and its caption. All captions are equally frequent."""
        pairs = list(itertools.product(self.digits, self.directions))
        digit, direction = pairs[index % len(pairs)]
        random = keyed_generator(self.seed, Stream.DATASET, index, subindex=half)
        scan = scans[digit][random.integers(len(scans[digit]))]
        start = (self._start(random, self.height), self._start(random, self.width))
        return self.clip(scan, start, direction), _caption(digit, direction)

    def _start(self, random: np.random.Generator, side: int) -> int:
        """Draw the first position along one side, which is 0 for a digit that fills it."""
        return 0 if side == _DIGIT else self.grid * int(random.integers(-(-side // self.grid)))


def write_moving_digits(folder: Path, world: World, num_clips: dict[str, int]) -> None:
    """Write `num_clips` of "train" and "heldout", the same on every call. Clips that exist are kept.

    Raises InputError if `folder` holds another world's, or a package is missing; OSError if it cannot be written.
    """
    description = json.dumps(asdict(world), indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "world.json"
    if written.is_file() and written.read_text(encoding="utf-8") != description:
        raise InputError(f"{folder}: holds the clips of another world ({written}); remove it or give another folder")
    write_text(written, description)
    write_digits(folder / "digits")
    for number, (half, count) in enumerate(num_clips.items()):
        (folder / half).mkdir(exist_ok=True)
        scans = {digit: _read_scans(folder / "digits" / half / str(digit)) for digit in world.digits}
        for index in range(count):
            file = folder / half / f"{index:06d}.mp4"
            if not file.exists():
                frames, caption = world.draw(index, number, scans)
                file.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
                # Written after its caption, so that every clip has one; renamed, so that a kill leaves no partial clip.
                _write_mp4(partial := file.with_suffix(".part"), frames)
                partial.rename(file)


def _caption(digit: int, direction: str) -> str:
    return f"{NAMES[digit]} moving {direction}"


def _read_scans(folder: Path) -> list[np.ndarray]:
    return [read_grey(file) for file in sorted(folder.glob("*.png"))]


def _write_mp4(path: Path, frames: np.ndarray) -> None:
    """Write grey frames (f, h, w) uint8 as H.264, every pixel _ZOOM wide."""
    from pomscale.media.mp4 import write_grey_clip  # noqa: PLC0415  PyAV is optional

    write_grey_clip(path, frames.repeat(_ZOOM, axis=1).repeat(_ZOOM, axis=2), fps=FPS, crf=_CRF)


def main() -> int:
    default = World()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that receives train/, heldout/ and digits/")
    parser.add_argument(
        "--digits", default=",".join(map(str, default.digits)), help="digits that the clips show (default %(default)s)"
    )
    parser.add_argument(
        "--directions", default=",".join(default.directions), help="directions in which they move (default %(default)s)"
    )
    for name, meaning in (
        ("height", "height of the canvas in pixels"),
        ("width", "width of the canvas in pixels"),
        ("num-frames", f"frames per clip, at {FPS} per second"),
        ("speed", "pixels that a digit moves per frame"),
        ("grid", "first positions are multiples of so many pixels"),
    ):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{meaning} (default %(default)s)")
    parser.add_argument("--train", type=int, default=3000, help="clips to train on (default %(default)s)")
    parser.add_argument("--heldout", type=int, default=600, help="clips to evaluate on (default %(default)s)")
    arguments = parser.parse_args()
    try:
        world = World(
            digits=_digits(arguments.digits),
            directions=tuple(arguments.directions.split(",")),
            height=arguments.height,
            width=arguments.width,
            num_frames=arguments.num_frames,
            speed=arguments.speed,
            grid=arguments.grid,
        )
        num_clips = {"train": arguments.train, "heldout": arguments.heldout}
        write_moving_digits(arguments.out, world, num_clips)
    except (PomscaleError, OSError) as error:  # OSError: the disk
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, PomscaleError) else 1
    for half, count in num_clips.items():
        print(
            f"{arguments.out / half}: {count} clips of {world.num_frames} frames, {world.height}x{world.width} "
            f'pixels {_ZOOM} wide; {len(world.captions)} captions, "{world.captions[0]}" and the like'
        )
    return 0


def _digits(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(digit) for digit in text.split(","))
    except ValueError as error:
        raise InputError(f"--digits: give digits with commas between them, got {text!r}") from error


if __name__ == "__main__":
    sys.exit(main())
