"""`pomscale evaluate digits`: whether generated digits are recognised, and whether they are copies.

A digit is asked for by its class, or by a prompt with its name, such as "a handwritten seven".

A support vector classifier is fitted on real digits that were not trained on. The distance of every picture to its
nearest training picture is set beside that of real held-out pictures: a model that copies has distances near 0.

Generated digits that are k times larger, of a model of enlarged ones, are averaged over k x k pixels before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC

from pomscale.base.errors import InputError
from pomscale.media.pictures import read_grey

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class DigitsReport:
    """Accuracies as shares, and distances to the nearest training picture.

    Distances are Euclidean, between pictures with values in [0, 1]; mean and 5th percentile. times_larger: side of the
    generated pictures over that of the real ones.
    """

    num_generated: int
    accuracy_generated: float
    accuracy_real: float
    accuracy_by_class: list[float]
    nearest_generated_mean: float
    nearest_generated_p05: float
    nearest_heldout_mean: float
    nearest_heldout_p05: float
    times_larger: int = 1

    def table(self) -> str:
        """Return a table for people."""
        rows = [
            ("recognised as the class asked for", f"{self.accuracy_generated:.1%}", f"{self.accuracy_real:.1%}"),
            ("distance to training half, mean", _three(self.nearest_generated_mean), _three(self.nearest_heldout_mean)),
            ("distance to training half, 5th %", _three(self.nearest_generated_p05), _three(self.nearest_heldout_p05)),
        ]
        lines = [
            f"{label:34}{generated:>12}{real:>12}" for label, generated, real in [("", "generated", "real"), *rows]
        ]
        lines.append(
            f"({self.num_generated} generated; real: recognition of the training half, distance of the held-out)"
        )
        if self.times_larger > 1:
            lines.append(
                f"(the generated ones have {self.times_larger} times the real ones' side: means of their pixels)"
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the figures as JSON."""
        return json.dumps(asdict(self), indent=1)


def evaluate_digits(npz: Path, train_folder: Path, heldout_folder: Path) -> DigitsReport:
    """Evaluate generated digits.

    Args:
        npz: File of `pomscale sample --npz`.
        train_folder: Folder of the training pictures, with one subfolder of PNGs per class.
        heldout_folder: Folder of pictures that were not trained on, likewise.

    Returns:
        The figures.

    Raises:
        InputError: A file is missing, or the generated pictures have not a whole number of times the real ones' size.
    """
    train, train_labels, size = _read_folder(train_folder)
    heldout, heldout_labels, _ = _read_folder(heldout_folder)
    try:
        with np.load(npz) as arrays:
            generated, asked = arrays["images"], _asked(npz, arrays)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{npz}: not a file of `pomscale sample --npz` ({error})") from error
    times_larger = max(1, generated.shape[1] // size[0]) if generated.ndim == 4 else 1
    if generated.shape[1:] != (times_larger * size[0], times_larger * size[1], 1):
        shown = "x".join(map(str, size))
        raise InputError(f"{npz}: pictures of {generated.shape[1:]}, and those of {train_folder} are grey and {shown}")
    generated = _averaged(generated[..., 0] / 255.0, times_larger).reshape(len(generated), -1)
    # gamma = "scale" adapts the kernel to the data; this is scikit-learn's own digits example otherwise.
    classifier = SVC(C=10.0).fit(heldout, heldout_labels)
    right = classifier.predict(generated) == asked
    nearest_generated = pairwise_distances(generated, train).min(axis=1)
    nearest_heldout = pairwise_distances(heldout, train).min(axis=1)
    return DigitsReport(
        num_generated=len(generated),
        accuracy_generated=float(right.mean()),
        accuracy_real=float(classifier.score(train, train_labels)),
        accuracy_by_class=[float(right[asked == label].mean()) for label in np.unique(asked)],
        nearest_generated_mean=float(nearest_generated.mean()),
        nearest_generated_p05=float(np.percentile(nearest_generated, 5)),
        nearest_heldout_mean=float(nearest_heldout.mean()),
        nearest_heldout_p05=float(np.percentile(nearest_heldout, 5)),
        times_larger=times_larger,
    )


def _asked(npz: Path, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the class that is asked for of each picture, (n,): its own, or that of the digit that its prompt names."""
    if "prompts" not in arrays:
        return arrays["classes"]
    asked = []
    for prompt in arrays["prompts"]:
        named = [label for label, name in enumerate(_NAMES) if name in str(prompt).lower().split()]
        if len(named) != 1:
            raise InputError(f"{npz}: the prompt {str(prompt)!r} names {len(named)} digits; name one, such as seven")
        asked += named
    return np.array(asked)


def _averaged(pictures: np.ndarray, times: int) -> np.ndarray:
    """Return pictures (n, times h, times w) as means (n, h, w) over times x times pixels."""
    num, height, width = pictures.shape
    return pictures.reshape(num, height // times, times, width // times, times).mean(axis=(2, 4))


def _three(value: float) -> str:
    return f"{value:.3f}"


def _read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Read pictures (n, pixels) float64 in [0, 1], labels (n,), and height and width from the subfolders of classes."""
    files = sorted(folder.glob("*/*.png"))
    if not files:
        raise InputError(f"{folder}: no class folders of PNGs here; write them: python -m data_pipelines.demos.digits")
    pictures = np.stack([read_grey(file) for file in files]) / 255.0
    _, height, width = pictures.shape
    return pictures.reshape(len(files), -1), np.array([int(file.parent.name) for file in files]), (height, width)
