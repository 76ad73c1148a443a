from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.demos import digits
from data_pipelines.demos.digits import write_digits


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
