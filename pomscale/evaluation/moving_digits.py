"""`pomscale evaluate moving-digits`: whether clips show the digit and the direction that their prompts ask for.

**Digit.** A support vector classifier is fitted on the middle frames of real clips that were not trained on, and
classifies the middle frames of the generated ones. Before that, the digit is rolled to the centre of the canvas and cut
out.

**Direction.** The centroid of the brightness is followed from frame to frame, on a canvas whose opposite sides touch:
it is the angle of the first Fourier coefficient, axis by axis. A step is the shorter way round. A clip moves in the
direction of the sum of its steps. The share of single steps in that direction is reported too, since a digit that jumps
may also arrive.

Both are measured for real clips in the same way, which gives the ceiling.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sklearn.svm import SVC

from pomscale.base.errors import InputError
from pomscale.media.clips import read_grey_frames

_DIGIT = 8  # side of a digit, in pixels
_DIRECTIONS = (("up", "down"), ("left", "right"))  # by axis, and by sign
_MAX_REAL = 600  # more real clips of the training half would not change the ceiling


@dataclass(frozen=True)
class MovingDigitsReport:
    """Shares of clips; `by_prompt` has the shares of digit and direction among the generated clips of each prompt."""

    num_generated: int
    num_frames_generated: int
    num_frames_real: int
    digit_generated: float
    digit_real: float
    direction_generated: float
    direction_real: float
    steps_generated: float
    steps_real: float
    by_prompt: dict[str, tuple[float, float]]

    def table(self) -> str:
        """Return a table for people."""
        rows = [
            ("digit asked for, middle frame", self.digit_generated, self.digit_real),
            ("direction asked for", self.direction_generated, self.direction_real),
            ("steps in it, of all", self.steps_generated, self.steps_real),
        ]
        prompts = [
            (f'  "{prompt}"', f"{digit:.0%}, {direction:.0%}") for prompt, (digit, direction) in self.by_prompt.items()
        ]
        return "\n".join(
            [
                f"{'':34}{'generated':>12}{'real':>12}",
                *(f"{label:34}{generated:>12.1%}{real:>12.1%}" for label, generated, real in rows),
                "by prompt, digit and direction:",
                *(f"{label:34}{shares:>12}" for label, shares in prompts),
                f"({self.num_generated} generated clips of {self.num_frames_generated} frames; "
                f"real: the training half, {self.num_frames_real} frames)",
            ]
        )

    def to_json(self) -> str:
        """Return the figures as JSON."""
        return json.dumps(asdict(self), indent=1)


def evaluate_moving_digits(npz: Path, train_folder: Path, heldout_folder: Path) -> MovingDigitsReport:
    """Evaluate generated clips of moving digits.

    Args:
        npz: File of `pomscale sample --npz`.
        train_folder: Folder of the training clips, which data_pipelines.demos.moving_digits writes.
        heldout_folder: Folder of clips that were not trained on, likewise.

    Returns:
        The figures.

    Raises:
        InputError: A file is missing, or clips and captions are not of moving digits on canvases of one size.
    """
    try:
        with np.load(npz) as arrays:
            generated, prompts = arrays["clips"].mean(-1) / 255.0, [str(prompt) for prompt in arrays["prompts"]]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{npz}: not a file of `pomscale sample --npz` with clips ({error})") from error
    canvas = generated.shape[2:]
    heldout, heldout_captions = _read_folder(heldout_folder, canvas)
    real, real_captions = _read_folder(train_folder, canvas)
    unknown = sorted({_digit(prompt) for prompt in prompts} - {_digit(caption) for caption in heldout_captions})
    if unknown:
        raise InputError(f"{npz}: asks for {unknown}, of which there are no clips in {heldout_folder}")
    # gamma = "scale" adapts the kernel to the data; this is scikit-learn's own digits example otherwise.
    classifier = SVC(C=10.0).fit(_middle_digits(heldout), [_digit(caption) for caption in heldout_captions])
    digits = classifier.predict(_middle_digits(generated)) == [_digit(prompt) for prompt in prompts]
    directions, steps = _follow_captions(generated, prompts)
    real_directions, real_steps = _follow_captions(real, real_captions)
    asked = np.array(prompts)
    return MovingDigitsReport(
        num_generated=len(generated),
        num_frames_generated=generated.shape[1],
        num_frames_real=real.shape[1],
        digit_generated=float(digits.mean()),
        digit_real=float(classifier.score(_middle_digits(real), [_digit(caption) for caption in real_captions])),
        direction_generated=float(directions.mean()),
        direction_real=float(real_directions.mean()),
        steps_generated=float(steps.mean()),
        steps_real=float(real_steps.mean()),
        by_prompt={
            prompt: (float(digits[asked == prompt].mean()), float(directions[asked == prompt].mean()))
            for prompt in sorted(set(prompts))
        },
    )


def directions_of(clip: np.ndarray) -> tuple[str, list[str]]:
    """Return the direction in which the bright part of a clip moves, on the whole and from each frame to the next.

    The clip is (f, h, w) with at least two frames; directions are left, right, up and down.
    """
    sides = np.array(clip.shape[1:])
    steps = np.diff(_centroids(clip), axis=0)
    steps = (steps + sides / 2) % sides - sides / 2
    return _direction(steps.sum(0)), [_direction(step) for step in steps]


def digit_of(frame: np.ndarray) -> np.ndarray:
    """Cut the digit (8, 8) out of a frame (h, w). An axis that the digit fills is kept, since it cannot move there."""
    centroid = _centroids(frame[None])[0]
    for axis, side in enumerate(frame.shape):
        if side > _DIGIT:
            frame = np.roll(frame, round((side - 1) / 2 - centroid[axis]), axis)
    top, left = ((side - _DIGIT) // 2 for side in frame.shape)
    return frame[top : top + _DIGIT, left : left + _DIGIT]


def _direction(move: np.ndarray) -> str:
    """Return the direction of the larger part of a move in rows and columns (2,)."""
    axis = int(np.argmax(np.abs(move)))
    return _DIRECTIONS[axis][int(move[axis] > 0)]


def _centroids(clip: np.ndarray) -> np.ndarray:
    """Return row and column (f, 2) of the centroid of each frame of a clip (f, h, w) on a torus."""
    centroids = []
    for axis, side in ((2, clip.shape[1]), (1, clip.shape[2])):
        circle = np.exp(2j * np.pi * np.arange(side) / side)
        centroids.append(np.angle(clip.sum(axis) @ circle) * side / (2 * np.pi))
    return np.stack(centroids, axis=1)


def _middle_digits(clips: np.ndarray) -> np.ndarray:
    """Return the digits in the middle frames of clips (n, f, h, w): (n, 64)."""
    return np.stack([digit_of(clip[len(clip) // 2]).ravel() for clip in clips])


def _follow_captions(clips: np.ndarray, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each clip of (n, f, h, w) moves as its caption says, and whether each step does (n, f - 1)."""
    asked = [caption.split()[-1] for caption in captions]
    wholes, steps = zip(*map(directions_of, clips), strict=True)
    return np.array(wholes) == asked, np.array(steps) == np.array(asked)[:, None]


def _digit(caption: str) -> str:
    """Return the digit of a caption: "three" for "three moving left"."""
    return caption.split(maxsplit=1)[0]


def _read_folder(folder: Path, canvas: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    """Read clips (n, f, h, w) in [0, 1] on a canvas (h, w), and their captions."""
    files = sorted(folder.glob("*.mp4"))[:_MAX_REAL]
    if not files:
        raise InputError(f"{folder}: no clips here; write them: python -m data_pipelines.demos.moving_digits")
    clips = np.stack([_read_clip(file, canvas) for file in files])
    return clips, [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]


def _read_clip(file: Path, canvas: tuple[int, int]) -> np.ndarray:
    """Read a clip (f, h, w) in [0, 1], as means over the pixels of the file that show one pixel of the canvas."""
    frames = read_grey_frames(file)
    height, width = canvas
    zoom = frames.shape[1] // height
    if frames.shape[1:] != (height * zoom, width * zoom):
        raise InputError(f"{file}: frames of {frames.shape[1:]} are no multiple of the generated ones, {canvas}")
    return frames.reshape(-1, height, zoom, width, zoom).mean((2, 4)) / 255.0
