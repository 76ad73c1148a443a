"""A folder of clips, with or without captions beside them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from pomscale.base.errors import InputError
from pomscale.config.encode import VideoFolderConfig
from pomscale.media import CLIP_EXTENSIONS, extension
from pomscale.sources import storage
from pomscale.sources.folders import Entry, check_folder, walk
from pomscale.sources.item_fields import checked_caption, checked_key, decode_text, readable
from pomscale.sources.protocol import Caption, Item, SourceChangedError

_CAPTION_EXTENSION = ".txt"
_NUM_CAPTION_READERS = 32


class VideoFolderSource:
    """ROOT/**/*.{mp4,webm,mkv,mov,avi,m4v}, sorted by the parts of their paths. What is hidden is left out."""

    shuffled = True
    cuts_files = False
    num_filtered = 0
    class_names = ()

    def __init__(self, config: VideoFolderConfig) -> None:
        self._root = config.path
        self._captions = config.captions
        self._caption_lines = config.caption_lines
        self._num_ignored = 0

    @property
    def num_ignored(self) -> int:
        """Number of files that are neither clips nor captions, and of hidden files and folders."""
        return self._num_ignored

    def check_exists(self) -> None:
        check_folder(self._root)

    def scan(self) -> Iterator[Item]:
        """Yield the clips. Raises InputError if the folder is missing or cannot be read, or has no clip in it."""
        self._num_ignored = 0
        clips, num_clips = self._clips(), 0
        # A caption is a small file: what takes time is to wait for each.
        with ThreadPoolExecutor(_NUM_CAPTION_READERS, "captions") as pool:
            while batch := list(itertools.islice(clips, 4 * _NUM_CAPTION_READERS)):
                num_clips += len(batch)
                yield from pool.map(self._item, batch)
        if not num_clips:
            raise InputError(f"source.path: no clip ({', '.join(sorted(CLIP_EXTENSIONS))}) in {self._root}")

    def fingerprint_line(self, item: Item) -> str:
        """Return path, size and caption."""
        return json.dumps([*item.location, item.caption])

    def open(self, item: Item) -> BinaryIO:
        path, size = item.location
        return storage.open_item(storage.join(self._root, path), size)

    def _clips(self) -> Iterator[Entry]:
        for entry in walk(self._root):
            if extension(entry.path) in CLIP_EXTENSIONS and not entry.is_hidden:
                yield entry
            elif entry.is_hidden or not (self._captions and extension(entry.path) == _CAPTION_EXTENSION):
                self._num_ignored += 1

    def _item(self, clip: Entry) -> Item:
        name = os.path.splitext(clip.path)[0]
        key, problem = checked_key(name)
        problem, caption = clip.problem or problem, None
        if self._captions:
            caption, unusable = self._read_caption(name)
            problem = problem or unusable
        return Item(key, readable(clip.path), [clip.path, clip.size], caption=caption, problem=problem)

    def _read_caption(self, name: str) -> tuple[Caption, str | None]:
        """Return the caption of a clip, and why there is none, or None."""
        try:
            with storage.open_item(storage.join(self._root, name + _CAPTION_EXTENSION), None) as stream:
                return checked_caption(decode_text(stream.read()), self._caption_lines)
        except FileNotFoundError:
            return checked_caption(None)
        except SourceChangedError as error:
            return None, f"its caption {error}"
