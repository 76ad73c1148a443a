"""Write real pictures that need no download: scikit-learn's handwritten digits, as a class folder of PNGs.

    python -m data_pipelines.demos.digits data/digits

The 1,797 scans (8x8 pixels, 17 grey levels) are halved within each class: OUT/train/0..9 and OUT/heldout/0..9.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.media.pictures import write_png

_SPLIT_SEED = 0
_WHITE = 16  # scikit-learn's grey levels are 0..16


def write_digits(folder: Path) -> dict[str, int]:
    """Write both halves under `folder`, the same files on every call. Return the number of pictures per half.

    Raises InputError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  an extra, needed by the quickstart only
    except ImportError as error:
        raise InputError("the digits come with scikit-learn: pip install -e '.[quickstart]'") from error
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / _WHITE)).astype(np.uint8)
    counts = {"train": 0, "heldout": 0}
    for label in range(10):
        members = np.flatnonzero(digits.target == label)
        members = keyed_generator(_SPLIT_SEED, Stream.DATASET, label).permutation(members)
        for half, indices in zip(counts, np.array_split(members, 2), strict=True):
            target = folder / half / str(label)
            target.mkdir(parents=True, exist_ok=True)
            for index in indices:
                write_png(target / f"{index:04d}.png", pixels[index])
            counts[half] += len(indices)
    return counts


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
