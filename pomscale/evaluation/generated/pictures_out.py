"""Measured pictures, written part by part: PNGs (clips: mp4) in tars, and one npz file as ADM's evaluator reads it."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write
from pomscale.evaluation.generated.picture_sets import Batch, Kind, PictureSet
from pomscale.pretrained.card import DEFAULT_FPS

_PIECE = 1 << 22


def tar_path(folder: Path, part: int, kind: Kind) -> Path:
    """Return the tar of a part."""
    return folder / f"{kind}-{part:06d}.tar"


def clip_rate(pictures: PictureSet) -> float:
    """Return the frames per second of written clips, which have the measured frames alone; of pictures any number."""
    return (pictures.fps or DEFAULT_FPS) / (1 if pictures.frames is None else pictures.frames.stride)


def check_no_tars(folder: Path) -> None:
    """Raise InputError if the folder has tars, which would be taken for those of this evaluation."""
    if any(folder.glob("*.tar")):
        raise InputError(f"--write-tars {folder}: there are tars in it; choose another folder, or delete them")


class TarOut:
    """A WebDataset tar that is written: NUMBER.png and NUMBER.cls with its class, or NUMBER.mp4 and NUMBER.txt.

    Classes and captions (.txt) are there where the set has them.
    """

    def __init__(self, stream: BinaryIO, fps: float) -> None:
        self._fps = fps
        self._tar = tarfile.TarFile(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, batch: Batch) -> None:
        """Write the pictures of a batch."""
        for row, number in enumerate(batch.numbers):
            pixels = batch.pixels[row].numpy()
            if pixels.ndim == 4:
                self._add(f"{number:08d}.mp4", _mp4(pixels.transpose(1, 2, 3, 0), self._fps))
            else:
                self._add(f"{number:08d}.png", _png(pixels.transpose(1, 2, 0)))
            if batch.labels is not None:
                self._add(f"{number:08d}.cls", str(batch.labels[row]).encode())
            if batch.captions is not None and pixels.ndim == 4:
                self._add(f"{number:08d}.txt", batch.captions[row].encode())

    def close(self) -> None:
        """Write the end mark."""
        self._tar.close()

    def _add(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)  # its time is 0: equal pictures give equal bytes
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(content, format="PNG")
    return content.getvalue()


def _mp4(frames: np.ndarray, fps: float) -> bytes:
    from pomscale.media.mp4 import mp4_into  # noqa: PLC0415  PyAV is optional

    content = io.BytesIO()
    with mp4_into(content, fps) as stream:
        stream.write(np.broadcast_to(frames, (*frames.shape[:3], 3)))
    return content.getvalue()


@contextmanager
def open_tar(path: Path, fps: float) -> Iterator[TarOut]:
    """Open a tar that exists under its name, whole, once the block ends without an error; `fps` is that of clips."""
    with atomic_write(path) as stream:
        out = TarOut(stream, fps)
        yield out
        out.close()


class PixelsOut:
    """Bytes of pictures, channels last, one after the other: a piece of the array in the npz file."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def add(self, batch: Batch) -> None:
        """Write the pictures of a batch."""
        self._stream.write(np.ascontiguousarray(batch.pixels.numpy().transpose(0, 2, 3, 1)).data)


def write_npz(path: Path, pieces: Sequence[Path], shape: tuple[int, int, int, int], labels: np.ndarray | None) -> None:
    """Put the pieces of `PixelsOut` together to arr_0 (n, h, w, c), and labels to arr_1 (n,), holding none of them.

    The bytes depend on the pictures alone.

    Args:
        path: The npz file, not compressed, as np.savez writes it.
        pieces: Files with the bytes of the parts, in order.
        shape: (n, h, w, c).
        labels: Class ids (n,), or None.
    """
    with atomic_write(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for piece in pieces:
                with piece.open("rb") as content:
                    shutil.copyfileobj(content, member, _PIECE)
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, np.int64), version=(1, 0), allow_pickle=False)
