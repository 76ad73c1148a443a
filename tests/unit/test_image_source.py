from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.images.digits import write_digits
from data_pipelines.images.source import scan_image_folder
from pomscale.errors import InputError


def touch(path: Path, content: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_items_are_sorted_and_keys_are_safe_for_tars(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a.1/x.y.jpeg", "b/1.webp", "b/deep/3.jpg", "b/notes.txt", ".git/4.png", "README"):
        touch(tmp_path / name)
    source = scan_image_folder(tmp_path)
    assert source.class_names == ("a.1", "b")
    assert [(item.key, item.label) for item in source.items] == [
        ("a_1/x_y", 0),
        ("b/1", 1),
        ("b/2", 1),
        ("b/deep/3", 1),
    ]
    assert source.num_ignored == 2


def test_fingerprint_follows_names_and_sizes_not_the_place(tmp_path: Path) -> None:
    for root in ("one", "two", "three"):
        touch(tmp_path / root / "a" / "1.png", b"xx")
    touch(tmp_path / "three" / "a" / "1.png", b"xxx")
    one, two, three = (scan_image_folder(tmp_path / root).fingerprint for root in ("one", "two", "three"))
    assert one == two != three


def test_wrong_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        scan_image_folder(tmp_path / "nowhere")
    touch(tmp_path / "loose.png")
    with pytest.raises(InputError, match="no class folders"):
        scan_image_folder(tmp_path)
    touch(tmp_path / "cat" / "1.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(InputError, match=r"class folder\(s\) dog"):
        scan_image_folder(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"cannot read .*cat/gone\.png: No such file"):
        scan_image_folder(tmp_path)

    def forbidden(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", forbidden)
    with pytest.raises(InputError, match=rf"cannot read {tmp_path}: Permission denied"):
        scan_image_folder(tmp_path)


@pytest.mark.parametrize("name", [b"cat/\xff.png", b"c\xe4t/1.png"])
def test_names_that_are_not_utf8_are_refused(tmp_path: Path, name: bytes) -> None:
    try:
        touch(tmp_path / os.fsdecode(name))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(InputError, match=re.escape(f"{name!r} is not UTF-8")):
        scan_image_folder(tmp_path)


def test_two_pictures_of_one_key_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "1.png")
    touch(tmp_path / "a" / "1.jpg")
    with pytest.raises(InputError, match=r"a/1\.jpg and a/1\.png.*key a/1"):
        scan_image_folder(tmp_path)


def test_names_too_long_for_a_tar_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "a" / f"{'n' * 90}.png")
    with pytest.raises(InputError, match="too long for a tar header"):
        scan_image_folder(tmp_path)


def test_digits_are_halved_by_class_and_exact(tmp_path: Path) -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    assert write_digits(tmp_path / "one") == {"train": 901, "heldout": 896}
    train, heldout = (scan_image_folder(tmp_path / "one" / half) for half in ("train", "heldout"))
    assert train.class_names == heldout.class_names == tuple("0123456789")
    names = {Path(item.path).stem for source in (train, heldout) for item in source.items}
    assert len(names) == 1797
    digits = sklearn_datasets.load_digits()
    for item in (train.items[0], heldout.items[-1]):
        index = int(Path(item.path).stem)
        root = train.root if item is train.items[0] else heldout.root
        pixels = np.asarray(Image.open(root / item.path))
        assert digits.target[index] == item.label
        np.testing.assert_array_equal(pixels, np.rint(digits.images[index] * 255 / 16))
    write_digits(tmp_path / "two")
    assert scan_image_folder(tmp_path / "two" / "train").fingerprint == train.fingerprint


def test_the_digits_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_pipelines.images.digits", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "901 handwritten digits" in out
