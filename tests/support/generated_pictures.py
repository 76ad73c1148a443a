"""Pictures for evaluations: files of several kinds with the same pixels."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def make_pixels(count: int, size: tuple[int, ...] = (8, 8), seed: int = 0) -> np.ndarray:
    """Smooth random pictures (count, *size) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(128, 40, (count, *size)) + rng.normal(0, 30, (count, *(1 for _ in size)))
    return coarse.clip(0, 255).astype(np.uint8)


def write_folder(folder: Path, pixels: np.ndarray) -> Path:
    """Write pictures as PNGs at two depths, whose sorted paths are in the order of the pictures."""
    for number, one in enumerate(pixels):
        path = folder / f"{number // 5:02d}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(path)
    return folder


def write_tar(path: Path, pixels: np.ndarray, captions: list[str] | None = None) -> Path:
    """Write pictures as a WebDataset tar, perhaps with captions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, one in enumerate(pixels):
            content = io.BytesIO()
            Image.fromarray(one).save(content, format="PNG")
            members = {f"{number:04d}.png": content.getvalue()}
            if captions is not None:
                members[f"{number:04d}.txt"] = captions[number].encode()
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path
