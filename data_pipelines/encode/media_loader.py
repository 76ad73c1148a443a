"""Items with their decoded media: threads decode some batches ahead, items come in order.

Time ranges of one file that are neighbours are decoded together, in one pass over the file.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np

from data_pipelines.encode.setup import EncodeSetup
from pomscale.config.encode import ImageTransformConfig, VideoTransformConfig
from pomscale.media import UnreadableMediaError, nearest_bucket
from pomscale.media.pictures import decode_picture, fit_picture
from pomscale.shards.pictures import pack_picture
from pomscale.shards.schema import ArrayName
from pomscale.sources.protocol import Item, SourceChangedError

if TYPE_CHECKING:
    from pomscale.media.clips import DecodedClip

# Bytes of decoded clips that one pass over a file may give before they are taken; at least one clip.
_PASS_BYTES = 2**28

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pixels:
    """Pixels of an item in the size of one variant, uint8, (h, w, c) or (f, h, w, c)."""

    group: int
    values: np.ndarray
    packed: dict[ArrayName, bytes] = field(default_factory=dict)
    """The member that holds them, where the pixels themselves are stored; decoding threads pack it."""


@dataclass(slots=True)
class Loaded:
    """An item with its media by variant, or with the reason why there are none."""

    position: int
    item: Item
    media: dict[int, Pixels] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    texts: dict[ArrayName, np.ndarray] = field(default_factory=dict)  # (n, dim) float16 each, set by the text stage
    failure: str | None = None
    is_gone: bool = False
    has_audio: bool = False

    def take(self, variant: int, clip: DecodedClip) -> None:
        """Take a decoded clip as the media of a variant."""
        self.info, self.has_audio = clip.info, clip.has_audio
        self.media[variant] = Pixels(clip.target, clip.frames)


class MediaLoader:
    """Loads the items of positions, in `num_workers` threads. Close it at the end."""

    def __init__(self, setup: EncodeSetup, waited: Callable[[float], None]) -> None:
        """`waited` is told the seconds in which an item was asked for and not there."""
        self._setup = setup
        self._recipe = setup.recipe
        self._waited = waited
        self._threads = ThreadPoolExecutor(self._recipe.num_workers, "decode")
        self._num_at_once = self._clips_at_once() if setup.table.cuts_files and self._recipe.opens_media else 1

    def close(self) -> None:
        """Let the threads end with what they are decoding."""
        self._threads.shutdown(cancel_futures=True)

    def load(self, parts: Iterable[tuple[T, Iterable[int], list[int]]]) -> Iterator[tuple[T, Loaded | None]]:
        """Yield the items of each part in order, then None, while the threads work some batches ahead.

        A part is given with its positions and the variants that are wanted of them.
        """
        look_ahead = 2 * self._recipe.batch + self._recipe.num_workers
        pending: deque[tuple[T, Future[list[Loaded]] | None]] = deque()
        num_pending = 0
        for part, positions, variants in parts:
            for together in self._together(positions):
                pending.append((part, self._threads.submit(self._load, together, variants)))
                num_pending += len(together)
                # No thread is to be idle where one file fills the look-ahead.
                while num_pending > look_ahead and len(pending) > self._recipe.num_workers:
                    for loaded in self._wait(*pending.popleft()):
                        num_pending -= loaded[1] is not None
                        yield loaded
            pending.append((part, None))
        while pending:
            yield from self._wait(*pending.popleft())

    def _wait(self, part: T, future: Future[list[Loaded]] | None) -> Iterator[tuple[T, Loaded | None]]:
        if future is None:
            yield part, None
            return
        start = time.monotonic()
        is_late = not future.done()
        found = future.result()
        if is_late:
            self._waited(time.monotonic() - start)
        found.reverse()
        while found:  # the list is not to hold what was taken
            yield part, found.pop()

    # -- positions that are loaded together ------------------------------------------------------------------------

    def _clips_at_once(self) -> int:
        targets = [] if self._recipe.transform is None else self._recipe.transform.targets
        largest = max(math.prod(target) for target in targets) * self._setup.encoders.num_channels_in
        return max(1, _PASS_BYTES // largest)

    def _together(self, positions: Iterable[int]) -> Iterator[Sequence[tuple[int, Item | None]]]:
        """Yield positions that are loaded by one thread: ranges of one file, or a single item, which it looks up."""
        if self._num_at_once == 1:
            yield from ([(position, None)] for position in positions)
            return
        items = ((position, self._setup.item(position)) for position in positions)
        for _, of_file in itertools.groupby(items, key=lambda entry: entry[1].location):
            while together := list(itertools.islice(of_file, self._num_at_once)):
                yield together

    # -- in the threads --------------------------------------------------------------------------------------------

    def _load(self, together: Sequence[tuple[int, Item | None]], variants: list[int]) -> list[Loaded]:
        entries = []
        for position, found in together:
            item = self._setup.item(position) if found is None else found
            entries.append(Loaded(position, item, failure=item.problem))
        sound = [entry for entry in entries if entry.failure is None]
        if sound and self._recipe.opens_media:
            try:
                with self._setup.source.open(sound[0].item) as stream:
                    self._decode(stream, sound, variants)
            except (UnreadableMediaError, SourceChangedError) as error:
                for entry in sound:
                    entry.failure = str(error)
            except FileNotFoundError:
                for entry in sound:
                    entry.failure, entry.is_gone = "the file is gone", True
        return entries

    def _decode(self, stream: BinaryIO, entries: list[Loaded], variants: list[int]) -> None:
        if isinstance(self._recipe.transform, VideoTransformConfig):
            self._decode_clips(stream, self._recipe.transform, entries, variants)
        else:
            (entry,) = entries
            self._decode_picture(stream, entry, variants)

    def _decode_picture(self, stream: BinaryIO, loaded: Loaded, variants: list[int]) -> None:
        transform, codec = self._recipe.transform, self._setup.encoders.codec
        assert isinstance(transform, ImageTransformConfig)
        picture = decode_picture(stream, self._setup.encoders.num_channels_in)
        loaded.info = {"width": picture.width, "height": picture.height}
        width, height = picture.image.size
        for number in variants:
            targets = self._setup.variants[number].targets
            group = nearest_bucket((height, width), targets)
            values = fit_picture(picture.image, (targets[group][0], targets[group][1]), transform.filter)
            packed: dict[ArrayName, bytes] = {}
            if codec is not None and codec.stored_dtype == "uint8":
                packed["latent"] = pack_picture(values.transpose(2, 0, 1), self._setup.coding)
            loaded.media[number] = Pixels(group, values, packed)

    def _decode_clips(
        self, stream: BinaryIO, transform: VideoTransformConfig, entries: list[Loaded], variants: list[int]
    ) -> None:
        from pomscale.media.clips import Span, decode_clip, decode_spans  # noqa: PLC0415  PyAV is optional

        targets, fps, filter = transform.buckets, transform.fps, transform.filter
        num_channels, keep = self._setup.encoders.num_channels_in, transform.incomplete == "keep"
        (only,) = variants  # pictures alone come in several sizes
        if entries[0].item.span is None:
            (entry,) = entries
            entry.take(only, decode_clip(stream, targets, fps, filter, num_channels, keep_incomplete=keep))
            return
        entries = sorted(entries, key=lambda entry: entry.item.span or [])  # one pass wants them in this order
        spans = [Span(*(Fraction(time, 1_000_000) for time in entry.item.span or ())) for entry in entries]
        clips = decode_spans(stream, spans, targets, fps, filter, num_channels, keep_incomplete=keep)
        for entry, clip in zip(entries, clips, strict=True):
            if isinstance(clip, UnreadableMediaError):
                entry.failure = str(clip)
            else:
                entry.take(only, clip)
