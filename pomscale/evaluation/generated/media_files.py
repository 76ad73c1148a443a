"""Files of pictures and of clips: a folder at any depth, or tars, on disk and behind URLs."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import BinaryIO, Protocol, TypeVar

from pomscale.base.errors import InputError
from pomscale.config.encode import TarSourceConfig, VideoFolderConfig
from pomscale.evaluation.generated.picture_sets import Failure, Kind
from pomscale.media import CLIP_EXTENSIONS, PICTURE_EXTENSIONS, UnreadableMediaError, extension
from pomscale.sources import storage
from pomscale.sources.folders import Entry, walk
from pomscale.sources.item_fields import readable
from pomscale.sources.protocol import Item, SourceChangedError
from pomscale.sources.tars import TarSource
from pomscale.sources.urls import is_url
from pomscale.sources.video_folder import VideoFolderSource

T = TypeVar("T")

# Formats that Pillow or other programs read, and `decode_picture` does not.
_UNREAD_PICTURES = (".apng", ".avif", ".bmp", ".gif", ".heic", ".jfif", ".jp2", ".jxl", ".pgm", ".ppm", ".tif", ".tiff")
_EXTENSIONS: dict[Kind, tuple[str, ...]] = {"pictures": PICTURE_EXTENSIONS, "clips": CLIP_EXTENSIONS}


class Files(Protocol):
    """The part of a source of raw items that is needed here."""

    def scan(self) -> Iterator[Item]: ...

    def open(self, item: Item) -> BinaryIO: ...


def _entries(root: str, kind: Kind) -> Iterator[Entry]:
    """Yield the pictures or clips below a folder, sorted by the parts of their paths, but for hidden ones.

    Raises InputError at the end if there are media of the other kind or in other formats, too: the figures would be of
    a part of the folder.
    """
    unread = Counter[str]()
    for entry in walk(root):
        suffix = extension(entry.path)
        if entry.is_hidden:
            continue
        if suffix in _EXTENSIONS[kind]:
            yield entry
        elif suffix in (*PICTURE_EXTENSIONS, *CLIP_EXTENSIONS, *_UNREAD_PICTURES):
            unread[suffix] += 1
    if unread:
        shown = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(unread.items()))
        raise InputError(
            f"{root}: there are files that are not measured ({shown}), only {', '.join(_EXTENSIONS[kind])} are; "
            f"convert them, or name a folder without them"
        )


def kind_of_folder(root: str) -> Kind:
    """Return the kind of the first picture or clip below a folder; "pictures" where there is none."""
    for entry in walk(root):
        suffix = extension(entry.path)
        if not entry.is_hidden and suffix in (*PICTURE_EXTENSIONS, *CLIP_EXTENSIONS):
            return "clips" if suffix in CLIP_EXTENSIONS else "pictures"
    return "pictures"


class FolderFiles:
    """ROOT/**/*.{png,jpg,jpeg,webp}; see `_entries`."""

    def __init__(self, root: str) -> None:
        self._root = root

    def scan(self) -> Iterator[Item]:
        for entry in _entries(self._root, "pictures"):
            location = [entry.path, entry.size, entry.modified_ns]
            yield Item(entry.path, readable(entry.path), location, problem=entry.problem)

    def open(self, item: Item) -> BinaryIO:
        path, size, _ = item.location
        return storage.open_item(storage.join(self._root, path), size)


class ClipFolderFiles(VideoFolderSource):
    """ROOT/**/*.{mp4,webm,...}, perhaps with NAME.txt beside each; see `_entries`.

    Other than those that are encoded, clips may have any names, and their locations have the time of the last change.
    """

    def open(self, item: Item) -> BinaryIO:
        return super().open(replace(item, location=item.location[:-1]))

    def _clips(self) -> Iterator[Entry]:
        yield from _entries(self._root, "clips")

    def _item(self, clip: Entry) -> Item:
        caption, problem = None, clip.problem
        if self._captions:
            caption, unusable = self._read_caption(os.path.splitext(clip.path)[0])
            problem = problem or unusable
        location = [clip.path, clip.size, clip.modified_ns]
        return Item(clip.path, readable(clip.path), location, caption=caption, problem=problem)


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


def clip_folder_files(root: str, with_captions: bool) -> Files:
    """Return the clips of a folder. If captions are wanted and the first clip has one (.txt), all must have one."""
    return _captioned(
        root,
        lambda captions: ClipFolderFiles(VideoFolderConfig(kind="video_folder", path=root, captions=captions)),
        with_captions,
    )


def tar_files(name: str, paths: list[str], with_captions: bool) -> Files:
    """Return the files of tars that paths or patterns name; `name` is for messages.

    If captions are wanted and the first sample has one (.txt), all must have one.
    """
    return _captioned(
        name,
        lambda captions: TarFiles(TarSourceConfig(kind="tars", path=paths, caption="txt" if captions else None)),
        with_captions,
    )


def _captioned(name: str, build: Callable[[bool], Files], with_captions: bool) -> Files:
    if with_captions:
        captioned = build(True)
        first = next(scanned(name, captioned), None)
        if first is not None and first.caption is not None:
            return captioned
    return build(False)


def kind_of_tars(name: str, files: Files) -> Kind:
    """Return the kind of the first sample of tars; "pictures" where there is none."""
    first = next(scanned(name, files), None)
    return "clips" if first is not None and extension(first.where) in CLIP_EXTENSIONS else "pictures"


def tars_of_folder(path: str) -> list[str]:
    """Return the tars at the top of a local folder, hidden ones left out; [] if pictures or clips lie there, too."""
    names = [name for name in sorted(os.listdir(path)) if not storage.is_hidden(name)] if os.path.isdir(path) else []
    if any(extension(name) in (*PICTURE_EXTENSIONS, *CLIP_EXTENSIONS) for name in names):
        return []
    return [os.path.join(path, name) for name in names if name.endswith(".tar")]


def scanned(name: str, files: Files) -> Iterator[Item]:
    """Yield the items of a source. InputError names what the user gave, and not a key of an encode recipe."""
    try:
        yield from files.scan()
    except InputError as error:
        raise InputError(f"{name}: {str(error).removeprefix('source.path: ').removeprefix(f'{name}: ')}") from error


def read_item(files: Files, item: Item, decode: Callable[[BinaryIO], T]) -> T | Failure:
    """Return what `decode` makes of an item's stream, or why it cannot be read."""
    if item.problem is not None:
        return Failure(item.where, item.problem)
    try:
        with files.open(item) as stream:
            return decode(stream)
    except FileNotFoundError:
        return Failure(item.where, "is gone since it was listed")
    except (UnreadableMediaError, SourceChangedError) as error:
        return Failure(item.where, str(error))


class Items:
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
