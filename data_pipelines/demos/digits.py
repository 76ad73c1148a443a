"""Write real pictures that need no download: scikit-learn's handwritten digits, as a class folder of PNGs.

    python -m data_pipelines.demos.digits data/digits

The 1,797 scans (8x8 pixels, 17 grey levels) are halved within each class: OUT/train/0..9 and OUT/heldout/0..9.
OUT/train.csv and OUT/heldout.csv give every file a caption, such as "a handwritten seven".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import write_text
from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.media.pictures import write_png

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HALVES = ("train", "heldout")
_SPLIT_SEED = 0
_WHITE = 16  # scikit-learn's grey levels are 0..16


@dataclass(frozen=True)
class Digit:
    """One scan: its number in scikit-learn's set, its half ("train" or "heldout"), class and pixels (8, 8) uint8."""

    index: int
    half: str
    label: int
    pixels: npt.NDArray[np.uint8]


def read_digits() -> Iterator[Digit]:
    """Yield all scans, class by class and half by half, in the same order on every call.

    Raises InputError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  an extra, needed by the quickstart only
    except ImportError as error:
        raise InputError("the digits come with scikit-learn: pip install -e '.[quickstart]'") from error
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / _WHITE)).astype(np.uint8)
    for label in range(10):
        members = np.flatnonzero(digits.target == label)
        members = keyed_generator(_SPLIT_SEED, Stream.DATASET, label).permutation(members)
        for half, indices in zip(HALVES, np.array_split(members, 2), strict=True):
            for index in indices:
                yield Digit(int(index), half, label, pixels[index])


def write_digits(folder: Path) -> dict[str, int]:
    """Write both halves under `folder`, the same files on every call. Return the number of pictures per half.

    Raises InputError if scikit-learn is not installed.
    """
    captions: dict[str, list[str]] = {half: [] for half in HALVES}
    for digit in read_digits():
        file = Path(digit.half) / str(digit.label) / f"{digit.index:04d}.png"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_png(folder / file, digit.pixels)
        captions[digit.half].append(f"{file.as_posix()},a handwritten {NAMES[digit.label]}\n")
    for half, lines in captions.items():
        write_text(folder / f"{half}.csv", "file,caption\n" + "".join(lines))
    return {half: len(lines) for half, lines in captions.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that receives train/ and heldout/")
    out: Path = parser.parse_args().out
    try:
        counts = write_digits(out)
    except PomscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for half, count in counts.items():
        print(f"{out / half}: {count} handwritten digits, 8x8 grey PNG, 10 class folders")
    return 0


if __name__ == "__main__":
    sys.exit(main())
