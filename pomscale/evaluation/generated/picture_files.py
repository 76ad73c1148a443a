"""Pictures in files: a folder at any depth, or tars, on disk and behind URLs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pomscale.base.errors import InputError
from pomscale.config.encode import ImageTransformConfig, VideoTransformConfig
from pomscale.evaluation.generated.crops import crop_of
from pomscale.evaluation.generated.media_files import Files, Items, read_item, scanned
from pomscale.evaluation.generated.picture_sets import Batch, Failure, checked_count, spread
from pomscale.media import PICTURE_EXTENSIONS, PictureFilter
from pomscale.media.pictures import DecodedPicture, decode_picture, fit_picture
from pomscale.sources.protocol import Item

# Pictures that are looked at before the work: a set is grey if all of them are.
_NUM_LOOKED_AT = 16


@dataclass(frozen=True)
class Fit:
    """Cut and resize pictures, or the frames of clips, as `pomscale data encode` does with such a transform.

    Attributes:
        size: Height and width in pixels.
        filter: Filter that resizes; None = that of encode recipes, lanczos for pictures and area for clips. adm is the
            crop of ADM, for square pictures.
    """

    size: tuple[int, int]
    filter: PictureFilter | None = None

    def of_pictures(self) -> ImageTransformConfig:
        """Return the transform of pictures. InputError for adm, if they are to be no squares."""
        if self.filter == "adm":
            height, width = self.size
            if height != width:
                raise InputError(f"--fit {height}x{width}: --filter adm cuts out squares; give a side alone")
            return ImageTransformConfig(size=height, filter="adm")
        return ImageTransformConfig(buckets=[self.size], filter=self.filter or "lanczos")

    def of_clips(self, num_frames: int) -> VideoTransformConfig:
        """Return the transform of clips; their rate is given elsewhere. InputError for adm."""
        if self.filter == "adm":
            raise InputError("--filter adm: is a crop of pictures, and these are clips; leave it out")
        return VideoTransformConfig(kind="video", buckets=[(num_frames, *self.size)], filter=self.filter or "area")


class PictureFiles:
    """Pictures of one size in files, or of any sizes if they are fitted."""

    frames = None
    fps = None

    def __init__(
        self, name: str, files: Files, *, kind: str, num: int | None, fit: Fit | None = None, num_threads: int = 2
    ) -> None:
        """List the files, and look at the first ones.

        Args:
            name: Name for messages.
            files: The files.
            kind: Kind of the set, for the result.
            num: Number of pictures that are measured, taken at equal distances; None = all.
            fit: The way in which pictures are cut and resized; None = they have one size already.
            num_threads: Threads that decode.

        Raises:
            InputError: There is no picture, fewer than `num`, or none of the first ones can be read.
        """
        self.name = name
        self._files = files
        self._kind = kind
        self._fit = fit
        self._num_threads = num_threads
        self._items = Items(scanned(name, files))
        if not len(self._items):
            raise InputError(f"{name}: no picture ({', '.join(PICTURE_EXTENSIONS)}) is here")
        self.num_pictures = checked_count(name, num, len(self._items))
        self._look()

    def _look(self) -> None:
        """Find size, channels and captions from the first pictures."""
        looked_at = [self._decoded(number, 3) for number in range(min(_NUM_LOOKED_AT, self.num_pictures))]
        found = [picture for picture in looked_at if isinstance(picture, DecodedPicture)]
        if not found:
            failure = looked_at[0]
            assert isinstance(failure, Failure)
            raise InputError(f"{self.name}: {failure.where}: {failure.reason}; none of the first pictures can be read")
        self.num_channels = 1 if all(picture.is_grey for picture in found) else 3
        image = found[0].image
        self.size: tuple[int, ...] = (image.height, image.width) if self._fit is None else self._fit.size
        self.has_captions = self._item(0).caption is not None

    @property
    def crop(self) -> dict[str, Any] | None:
        return None if self._fit is None else crop_of(self._fit.of_pictures())

    def identity(self) -> dict[str, Any]:
        """Return the settings, and the hash of all names, sizes and times; times are unknown behind URLs."""
        return {**self.settings(), "listing": self._items.sha256}

    def settings(self) -> dict[str, Any]:
        return {
            "kind": self._kind,
            "path": self.name,
            "count": self.num_pictures,
            "of": len(self._items),
            "fit": self.crop,
        }

    def batches(self, begin: int, end: int, batch: int) -> Iterator[Batch]:
        """Yield pictures; threads decode the next batch meanwhile. InputError for a picture of another size."""
        pool = ThreadPoolExecutor(self._num_threads, "decode")
        ahead: deque[tuple[list[int], list[Future[np.ndarray | Failure]]]] = deque()
        try:
            for first in range(begin, end, batch):
                numbers = list(range(first, min(first + batch, end)))
                ahead.append((numbers, [pool.submit(self._pixels, number) for number in numbers]))
                if len(ahead) > 1:
                    yield self._batch(*ahead.popleft())
            while ahead:
                yield self._batch(*ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _batch(self, numbers: list[int], futures: list[Future[np.ndarray | Failure]]) -> Batch:
        loaded = [future.result() for future in futures]
        found = [(number, one) for number, one in zip(numbers, loaded, strict=True) if isinstance(one, np.ndarray)]
        pixels = np.empty((len(found), *self.size, self.num_channels), np.uint8)
        for row, (_, one) in zip(pixels, found, strict=True):
            row[:] = one
        return Batch(
            [number for number, _ in found],
            torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))),
            captions=[self._item(number).captions[0] for number, _ in found] if self.has_captions else None,
            failures=[one for one in loaded if isinstance(one, Failure)],
        )

    def _pixels(self, number: int) -> np.ndarray | Failure:
        """Return the pixels of a picture (h, w, c)."""
        decoded = self._decoded(number, self.num_channels)
        if isinstance(decoded, Failure):
            return decoded
        where = self._item(number).where
        if self.num_channels == 1 and not decoded.is_grey:
            return Failure(
                where, "has colours, and the first pictures of this set are grey; measure them by themselves"
            )
        image = decoded.image
        if self._fit is not None:
            return fit_picture(image, self._fit.size, self._fit.of_pictures().filter)
        if (image.height, image.width) != self.size:
            height, width = self.size
            raise InputError(
                f"{self.name}: {where} has {image.height}x{image.width} pixels, and the first picture {height}x"
                f"{width}; cut and resize all to one size with --fit, such as --fit {min(self.size)}"
            )
        return np.asarray(image).reshape(image.height, image.width, self.num_channels)

    def _decoded(self, number: int, num_channels: int) -> DecodedPicture | Failure:
        return read_item(self._files, self._item(number), lambda stream: decode_picture(stream, num_channels))

    def _item(self, number: int) -> Item:
        return self._items[spread(number, self.num_pictures, len(self._items))]
