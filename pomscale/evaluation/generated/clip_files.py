"""Clips in video files: a folder at any depth, or tars, on disk and behind URLs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import torch

from pomscale.base.errors import InputError
from pomscale.evaluation.generated.crops import crop_of
from pomscale.evaluation.generated.media_files import Files, Items, read_item, scanned
from pomscale.evaluation.generated.picture_files import Fit
from pomscale.evaluation.generated.picture_sets import Batch, Failure, Frames, checked_count, spread
from pomscale.media import CLIP_EXTENSIONS
from pomscale.sources.protocol import Item

if TYPE_CHECKING:
    from pomscale.media.clips import DecodedClip

# PyAV is optional, and pictures are measured without it: what needs it is imported where the first clip is opened.
# ruff: noqa: PLC0415

# Clips that are looked at before the work, until one can be read.
_NUM_LOOKED_AT = 16
# Rates that differ by less are the same: 29.97 and 30, and what times in whole milliseconds make of 60 frames a second.
_SAME_RATE = 0.02


class Look(NamedTuple):
    """First look at a clip before the work: height and width in which it is shown, and frames per second."""

    size: tuple[int, int]
    fps: float


@dataclass(frozen=True)
class ClipReading:
    """How clips in files are read.

    Attributes:
        frames: The frames that are measured.
        fit: The way in which frames are cut and resized; None = the clips have one size already.
        fps: Frames per second to which clips are resampled, as `data encode` does; None = they have one rate already.
        num_threads: Threads that decode.
    """

    frames: Frames
    fit: Fit | None = None
    fps: float | None = None
    num_threads: int = 2


class ClipFiles:
    """Clips of one size and rate in files, in RGB, or of any if they are fitted and resampled.

    No more clips than those of a batch, and one or two more per thread, are in memory.
    """

    num_channels = 3

    def __init__(self, name: str, files: Files, reading: ClipReading, *, kind: str, num: int | None) -> None:
        """List the files, and look at the first ones.

        Args:
            name: Name for messages.
            files: The files.
            reading: How they are read.
            kind: Kind of the set, for the result.
            num: Number of clips that are measured, taken at equal distances; None = all.

        Raises:
            InputError: There is no clip, fewer than `num`, or none of the first ones can be read.
        """
        self.name, self.frames = name, reading.frames
        self._files, self._reading, self._kind = files, reading, kind
        self._items = Items(scanned(name, files))
        if not len(self._items):
            raise InputError(f"{name}: no clip ({', '.join(CLIP_EXTENSIONS)}) is here")
        self.num_pictures = checked_count(name, num, len(self._items), "clips")
        self.has_captions = self._item(0).caption is not None
        self.fps: float = reading.fps or self._first.fps
        self.size: tuple[int, ...] = (self.frames.num, *(reading.fit.size if reading.fit else self._first.size))

    @cached_property
    def _first(self) -> Look:
        """Size and rate of the first clip that can be read; of none where both are chosen by the user."""
        from pomscale.evaluation.generated.clip_look import look

        failures = []
        for number in range(min(_NUM_LOOKED_AT, self.num_pictures)):
            seen = read_item(self._files, self._item(number), lambda stream: look(stream, self.frames.span))
            if isinstance(seen, Look):
                return seen
            failures.append(seen)
        first = failures[0]
        raise InputError(f"{self.name}: {first.where}: {first.reason}; none of the first clips can be read")

    @property
    def crop(self) -> dict[str, Any] | None:
        fit = self._reading.fit
        return None if fit is None else crop_of(fit.of_clips(self.frames.span))

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
            "resampled_to_fps": self._reading.fps,
        }

    def batches(self, begin: int, end: int, batch: int) -> Iterator[Batch]:
        """Yield clips, which threads decode. InputError for a clip of another size or rate."""
        with ThreadPoolExecutor(self._reading.num_threads, "decode") as pool:
            for first in range(begin, end, batch):
                yield self._batch(pool, list(range(first, min(first + batch, end))))

    def _batch(self, pool: ThreadPoolExecutor, numbers: list[int]) -> Batch:
        pixels = torch.empty(len(numbers), self.num_channels, *self.size, dtype=torch.uint8)
        found, failures = list[int](), list[Failure]()
        for number, frames in zip(numbers, self._in_order(pool, numbers), strict=True):
            if isinstance(frames, Failure):
                failures.append(frames)
            else:
                pixels[len(found)] = torch.from_numpy(frames).permute(3, 0, 1, 2)
                found.append(number)
        captions = [self._item(number).captions[0] for number in found] if self.has_captions else None
        return Batch(found, pixels[: len(found)], captions=captions, failures=failures)

    def _in_order(self, pool: ThreadPoolExecutor, numbers: list[int]) -> Iterator[np.ndarray | Failure]:
        """Yield the frames of clips; as many clips as there are threads are decoded meanwhile."""
        waiting: deque[Future[np.ndarray | Failure]] = deque()
        for number in numbers:
            waiting.append(pool.submit(self._frames, number))
            if len(waiting) > self._reading.num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _frames(self, number: int) -> np.ndarray | Failure:
        """Return the measured frames of a clip (f h w 3), or why it cannot be read."""
        item = self._item(number)
        clip = read_item(self._files, item, self._decoded)
        if isinstance(clip, Failure):
            return clip
        self._check(item.where, clip)
        return clip.frames[:: self.frames.stride]

    def _decoded(self, stream: BinaryIO) -> DecodedClip:
        from pomscale.media.clips import decode_clip

        _, height, width = self.size
        fit = self._reading.fit
        return decode_clip(
            stream,
            [(self.frames.span, height, width)],
            self.fps,
            "area" if fit is None else fit.of_clips(self.frames.span).filter,
            self.num_channels,
        )

    def _check(self, where: str, clip: DecodedClip) -> None:
        """Raise InputError if a clip has another size than the first one, or another rate."""
        height, width = map(round, clip.shown)
        if self._reading.fit is None and (height, width) != self._first.size:
            first = "x".join(map(str, self._first.size))
            raise InputError(
                f"{self.name}: {where} has {height}x{width} pixels, and the first clip {first}; cut and resize all to "
                f"one size with --fit, such as --fit {first}"
            )
        rate = clip.info["source_fps"]  # None for one frame alone
        if self._reading.fps is None and rate is not None and not same_rate(rate, self.fps):
            raise InputError(
                f"{self.name}: {where} has {rate:g} frames per second, and the first clip {self.fps:g}; resample all "
                f"to one rate with --fps, such as --fps {self.fps:g}"
            )

    def _item(self, number: int) -> Item:
        return self._items[spread(number, self.num_pictures, len(self._items))]


def same_rate(one: float, other: float) -> bool:
    """Return whether two numbers of frames per second are the same but for rounding."""
    return abs(one - other) <= _SAME_RATE * max(one, other)
