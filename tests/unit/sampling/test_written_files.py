"""Files that samples are written to: a name of another format is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pomscale.base.errors import InputError
from pomscale.diffusion.options import SamplingOptions
from pomscale.sampling.clips import ClipFiles
from pomscale.sampling.pictures import PictureRequest, write_pictures


@pytest.mark.parametrize("names", [("g.txt", None), ("g.mp4", None), ("g.png", "g.png")])
def test_pictures(tmp_path: Path, names: tuple[str, str | None]) -> None:
    out, npz = (None if name is None else tmp_path / name for name in names)
    model: Any = None  # it is not looked at
    with pytest.raises(InputError, match=r"this file is written as \.(png|npz); name it g\."):
        write_pictures(
            model, None, PictureRequest(SamplingOptions(), num_each=1, batch=1), out=out or tmp_path, npz=npz
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [{"sheet": "s.mp4"}, {"npz": "s.txt"}])
def test_clips(tmp_path: Path, names: dict[str, str]) -> None:
    files = ClipFiles(tmp_path / "clips.mp4", **{field: tmp_path / name for field, name in names.items()})
    with pytest.raises(InputError, match=r"this file is written as \.(png|npz); name it s\."):
        files.make_folders()
