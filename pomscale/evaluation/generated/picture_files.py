"""Pictures in files: a folder at any depth, or tars, on disk and behind URLs."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch

from pomscale.base.errors import InputError
from pomscale.config.encode import ImageTransformConfig, TarSourceConfig
from pomscale.evaluation.generated.crops import crop_of
from pomscale.evaluation.generated.picture_sets import Batch, Failure, checked_count, spread
from pomscale.media import CLIP_EXTENSIONS, PICTURE_EXTENSIONS, UnreadableMediaError, extension
from pomscale.media.pictures import DecodedPicture, decode_picture, fit_picture
from pomscale.sources import storage
from pomscale.sources.folders import walk
from pomscale.sources.item_fields import readable
from pomscale.sources.protocol import Item, SourceChangedError
from pomscale.sources.tars import TarSource
from pomscale.sources.urls import is_url

# Pictures that are looked at before the work: a set is grey if all of them are.
_NUM_LOOKED_AT = 16


# Formats that Pillow or other programs read, and `decode_picture` does not.
_UNREAD_PICTURES = (".apng", ".avif", ".bmp", ".gif", ".heic", ".jfif", ".jp2", ".jxl", ".pgm", ".ppm", ".tif", ".tiff")


class Files(Protocol):
    """The part of a source of raw items that is needed here."""

    def scan(self) -> Iterator[Item]: ...

    def open(self, item: Item) -> BinaryIO: ...


class FolderFiles:
    """ROOT/**/*.{png,jpg,jpeg,webp}, sorted by the parts of their paths. What is hidden is left out.

    A folder with clips, or with pictures of other formats, is refused: the figures would be of a part of it.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    def scan(self) -> Iterator[Item]:
        unread = Counter[str]()
        for entry in walk(self._root):
            if entry.is_hidden:
                continue
            if extension(entry.path) in (*CLIP_EXTENSIONS, *_UNREAD_PICTURES):
                unread[extension(entry.path)] += 1
            elif extension(entry.path) in PICTURE_EXTENSIONS:
                location = [entry.path, entry.size, entry.modified_ns]
                yield Item(entry.path, readable(entry.path), location, problem=entry.problem)
        if unread:
            shown = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(unread.items()))
            raise InputError(
                f"{self._root}: there are files that are not measured ({shown}), only {', '.join(PICTURE_EXTENSIONS)} "
                f"are; convert them, or name a folder without them"
            )

    def open(self, item: Item) -> BinaryIO:
        path, size, _ = item.location
        return storage.open_item(storage.join(self._root, path), size)


class TarFiles(TarSource):
    """Samples of tars. Their locations have the time of the tar's last change, where it is no URL."""

    def scan(self) -> Iterator[Item]:
        times: dict[str, int | None] = {}
        for item in super().scan():
            if item.location is None:
                yield item
                continue
            path = self._files.path(item.location[0])
            if path not in times:
                times[path] = None if is_url(path) else os.stat(path).st_mtime_ns
            yield replace(item, location=[*item.location, times[path]])

    def open(self, item: Item) -> BinaryIO:
        return super().open(replace(item, location=item.location[:-1]))


def tar_files(paths: list[str], with_captions: bool) -> Files:
    """Return the files of tars that paths or patterns name.

    If captions are wanted and the first sample has one (.txt), all must have one.
    """
    if with_captions:
        captioned = TarFiles(TarSourceConfig(kind="tars", path=paths, caption="txt"))
        first = next(captioned.scan(), None)
        if first is not None and first.caption is not None:
            return captioned
    return TarFiles(TarSourceConfig(kind="tars", path=paths))


@dataclass(frozen=True)
class Fit:
    """Cut and resize pictures as `pomscale data encode` does with transform.size and transform.filter."""

    transform: ImageTransformConfig

    @property
    def target(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.transform.targets[0]
        return height, width


class PictureFiles:
    """Pictures of one size in files, or of any sizes if they are fitted."""

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
        self._items = _Items(_scanned(name, files))
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
        self.size: tuple[int, ...] = (image.height, image.width) if self._fit is None else self._fit.target
        self.has_captions = self._item(0).caption is not None

    @property
    def crop(self) -> dict[str, Any] | None:
        return None if self._fit is None else crop_of(self._fit.transform)

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
            return fit_picture(image, self._fit.target, self._fit.transform.filter)
        if (image.height, image.width) != self.size:
            height, width = self.size
            raise InputError(
                f"{self.name}: {where} has {image.height}x{image.width} pixels, and the first picture {height}x"
                f"{width}; cut and resize all to one size with --fit, such as --fit {min(self.size)}"
            )
        return np.asarray(image).reshape(image.height, image.width, self.num_channels)

    def _decoded(self, number: int, num_channels: int) -> DecodedPicture | Failure:
        item = self._item(number)
        if item.problem is not None:
            return Failure(item.where, item.problem)
        try:
            with self._files.open(item) as stream:
                return decode_picture(stream, num_channels)
        except FileNotFoundError:
            return Failure(item.where, "is gone since it was listed")
        except (UnreadableMediaError, SourceChangedError) as error:
            return Failure(item.where, str(error))

    def _item(self, number: int) -> Item:
        return self._items[spread(number, self.num_pictures, len(self._items))]


def _scanned(name: str, files: Files) -> Iterator[Item]:
    """Yield the items of a source. InputError names what the user gave, and not a key of an encode recipe."""
    try:
        yield from files.scan()
    except InputError as error:
        raise InputError(f"{name}: {str(error).removeprefix('source.path: ')}") from error


class _Items:
    """The items of a source in one block of memory: about a hundred bytes each, not the thousand of objects."""

    def __init__(self, items: Iterable[Item]) -> None:
        block, self._ends, digest = bytearray(), array("q", [0]), hashlib.sha256()
        for item in items:
            line = json.dumps([item.where, item.location, item.caption, item.problem]).encode()
            digest.update(line)
            block += line
            self._ends.append(len(block))
        self._block = bytes(block)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> Item:
        where, location, caption, problem = json.loads(self._block[self._ends[number] : self._ends[number + 1]])
        return Item(where, where, location, caption=caption, problem=problem)


def tars_of_folder(path: str) -> list[str]:
    """Return the tars at the top of a local folder, hidden ones left out; [] if there is a picture there, too."""
    names = [name for name in sorted(os.listdir(path)) if not storage.is_hidden(name)] if os.path.isdir(path) else []
    if any(extension(name) in PICTURE_EXTENSIONS for name in names):
        return []
    return [os.path.join(path, name) for name in names if name.endswith(".tar")]
