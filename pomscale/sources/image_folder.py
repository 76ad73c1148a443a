"""A folder with one subfolder of pictures per class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

from pomscale.base.errors import InputError
from pomscale.config.encode import ImageFolderConfig
from pomscale.media import PICTURE_EXTENSIONS, extension
from pomscale.sources import storage
from pomscale.sources.folders import Entry, check_folder, list_folder, walk
from pomscale.sources.item_fields import checked_key, readable
from pomscale.sources.protocol import Item


class ImageFolderSource:
    """ROOT/CLASS/**/*.{png,jpg,jpeg,webp}: classes sorted, then paths sorted. What is hidden is left out."""

    shuffled = True
    cuts_files = False
    num_filtered = 0

    def __init__(self, config: ImageFolderConfig) -> None:
        self._root = config.path
        self._class_names: tuple[str, ...] = ()
        self._num_ignored = 0

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names

    @property
    def num_ignored(self) -> int:
        """Number of files that are no PNG, JPEG or WebP, or hidden, and of hidden folders, each as one."""
        return self._num_ignored

    def check_exists(self) -> None:
        check_folder(self._root)

    def scan(self) -> Iterator[Item]:
        """Yield the pictures, class by class.

        Raises InputError if the folder is missing or cannot be read, has no class folders, or one of them is empty.
        """
        top = list(list_folder(self._root))
        folders = [entry.path for entry in top if entry.is_folder and not entry.is_hidden]
        if not folders:
            raise InputError(
                f"source.path: {self._root} has no class folders; put the pictures in one subfolder per class"
            )
        self._class_names = tuple(readable(folder) for folder in folders)
        self._num_ignored = len(top) - len(folders)
        empty = []
        for label, folder in enumerate(folders):
            num_pictures = 0
            for entry in walk(self._root, folder):
                if extension(entry.path) in PICTURE_EXTENSIONS and not entry.is_hidden:
                    num_pictures += 1
                    yield _item(entry, label)
                else:
                    self._num_ignored += 1
            if not num_pictures:
                empty.append(folder)
        if empty:
            raise InputError(
                f"source.path: no PNG, JPEG or WebP in class folder(s) {', '.join(map(readable, empty))} of "
                f"{self._root}; add pictures or delete the folder, since every folder is a class"
            )

    def fingerprint_line(self, item: Item) -> str:
        """Return path and size. Times are left out, since they change when the folder is copied."""
        path, size = item.location
        return f"{path}\0{size}"

    def open(self, item: Item) -> BinaryIO:
        path, size = item.location
        return storage.open_item(storage.join(self._root, path), size)


def _item(entry: Entry, label: int) -> Item:
    key, problem = checked_key(os.path.splitext(entry.path)[0])
    return Item(key, readable(entry.path), [entry.path, entry.size], label, problem=entry.problem or problem)
