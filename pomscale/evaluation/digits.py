"""`pomscale evaluate digits`: whether generated digits are recognised, and whether they are copies.

A support vector classifier is fitted on real digits that were not trained on. The distance of every picture to its
nearest training picture is set beside that of real held-out pictures: a model that copies has distances near 0.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC

from pomscale.base.errors import InputError
from pomscale.media.pictures import read_grey


@dataclass(frozen=True)
class DigitsReport:
    """Accuracies as shares, and distances to the nearest training picture.

    Distances are Euclidean, between pictures with values in [0, 1]; mean and 5th percentile.
    """

    num_generated: int
    accuracy_generated: float
    accuracy_real: float
    accuracy_by_class: list[float]
    nearest_generated_mean: float
    nearest_generated_p05: float
    nearest_heldout_mean: float
    nearest_heldout_p05: float

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
        return "\n".join(
            [
                *lines,
                f"({self.num_generated} generated; real: recognition of the training half, distance of the held-out)",
            ]
        )

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
        InputError: A file is missing, or the pictures' sizes differ.
    """
    train, train_labels = _read_folder(train_folder)
    heldout, heldout_labels = _read_folder(heldout_folder)
    try:
        with np.load(npz) as arrays:
            generated, asked = arrays["images"], arrays["classes"]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{npz}: not a file of `pomscale sample --npz` ({error})") from error
    if generated[0].size != train.shape[1]:
        raise InputError(f"{npz}: pictures of {generated.shape[1:]}, but {train_folder} has {train.shape[1]} pixels")
    generated = generated.reshape(len(generated), -1) / 255.0
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
    )


def _three(value: float) -> str:
    return f"{value:.3f}"


def _read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read pictures (n, pixels) float64 in [0, 1] and labels (n,) from the subfolders of classes."""
    files = sorted(folder.glob("*/*.png"))
    if not files:
        raise InputError(f"{folder}: no class folders of PNGs here; write them: python -m data_pipelines.demos.digits")
    pictures = np.stack([read_grey(file).ravel() for file in files]) / 255.0
    return pictures, np.array([int(file.parent.name) for file in files])
