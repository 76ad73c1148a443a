from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.demos import digits
from data_pipelines.demos.digits import write_digits
from pomscale.base.errors import InputError
from pomscale.evaluation.digits import evaluate_digits


def test_digits_are_halved_by_class_and_exact(tmp_path: Path) -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    assert write_digits(tmp_path / "one") == {"train": 901, "heldout": 896}
    files = sorted((tmp_path / "one").glob("*/*/*.png"))
    assert len({path.stem for path in files}) == 1797
    scans = sklearn_datasets.load_digits()
    for path in (files[0], files[-1]):
        assert scans.target[int(path.stem)] == int(path.parent.name)
        np.testing.assert_array_equal(
            np.asarray(Image.open(path)), np.rint(scans.images[int(path.stem)] * 255 / 16).astype(np.uint8)
        )
    write_digits(tmp_path / "two")
    for path in files:
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()


def test_the_digits_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["digits", str(tmp_path)])
    assert digits.main() == 0
    assert "901 handwritten digits" in capsys.readouterr().out


def write_samples(path: Path, pictures: np.ndarray, classes: np.ndarray) -> Path:
    """As `pomscale sample --npz` does: pictures (n, h, w) uint8."""
    np.savez(path, images=pictures[..., None], classes=classes, seeds=np.arange(len(pictures)))
    return path


def test_digits_of_twice_the_size_are_measured_by_the_means_of_their_pixels(tmp_path: Path) -> None:
    write_digits(tmp_path)
    files = sorted((tmp_path / "train").glob("*/*.png"))[::30]
    digits = np.stack([np.asarray(Image.open(file)) for file in files])
    classes = np.array([int(file.parent.name) for file in files])
    folders = tmp_path / "train", tmp_path / "heldout"
    once = evaluate_digits(write_samples(tmp_path / "once.npz", digits, classes), *folders)
    enlarged = digits.repeat(2, axis=1).repeat(2, axis=2)
    twice = evaluate_digits(write_samples(tmp_path / "twice.npz", enlarged, classes), *folders)
    assert twice == replace(once, times_larger=2)
    assert once.nearest_generated_mean == pytest.approx(0, abs=1e-6)
    assert once.times_larger == 1
    assert "have 2 times the real ones' side" in twice.table()
    assert "times the real" not in once.table()
    for odd in (enlarged[:, :15], enlarged[:, :, :8], digits[:, :4, :4]):
        with pytest.raises(InputError, match=r"odd.npz: pictures of \(\d+, \d+, 1\), and those of .* grey and 8x8"):
            evaluate_digits(write_samples(tmp_path / "odd.npz", odd, classes), *folders)


def test_a_prompt_asks_for_the_digit_that_it_names(tmp_path: Path) -> None:
    write_digits(tmp_path)
    captions = (tmp_path / "train.csv").read_text().splitlines()
    assert captions[0] == "file,caption"
    assert len(captions) == 1 + 901
    rows = [line.split(",") for line in captions[1::30]]
    digits = np.stack([np.asarray(Image.open(tmp_path / file)) for file, _ in rows])
    classes = np.array([int(Path(file).parent.name) for file, _ in rows])
    folders = tmp_path / "train", tmp_path / "heldout"
    by_class = evaluate_digits(write_samples(tmp_path / "classes.npz", digits, classes), *folders)
    prompted = tmp_path / "prompts.npz"
    np.savez(prompted, images=digits[..., None], prompts=np.array([caption for _, caption in rows]))
    assert evaluate_digits(prompted, *folders) == by_class
    for prompt, number in (("a handwritten letter", 0), ("seven or nine", 2)):
        np.savez(prompted, images=digits[:1, ..., None], prompts=np.array([prompt]))
        with pytest.raises(InputError, match=rf"the prompt '{prompt}' names {number} digits; name one"):
            evaluate_digits(prompted, *folders)
