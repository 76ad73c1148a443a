"""A folder with one subfolder of pictures per class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

from data_pipelines.sources import fs
from data_pipelines.sources.keys import checked_key, readable
from data_pipelines.sources.media import PICTURE_EXTENSIONS, extension
from data_pipelines.sources.source import Item
from pomscale.base.errors import InputError
from pomscale.config.encode import ImageFolderConfig


class ImageFolderSource:
    """ROOT/CLASS/**/*.{png,jpg,jpeg,webp}: classes sorted, then paths sorted. Hidden class folders are left out."""

    shuffled = True

    def __init__(self, config: ImageFolderConfig) -> None:
        self._root = config.path
        self._class_names: tuple[str, ...] = ()
        self._num_ignored = 0

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names

    @property
    def num_ignored(self) -> int:
        """Files that are no PNG, JPEG or WebP."""
        return self._num_ignored

    def scan(self) -> Iterator[Item]:
        """InputError if the folder is missing or cannot be read, has no class folders, or one of them is empty."""
        top = list(fs.list_folder(self._root))
        folders = [entry.path for entry in top if entry.is_folder and entry.path[0] != "."]
        if not folders:
            raise InputError(
                f"source.path: {self._root} has no class folders; put the pictures in one subfolder per class"
            )
        self._class_names = tuple(readable(folder) for folder in folders)
        self._num_ignored = sum(not entry.is_folder for entry in top)
        empty = []
        for label, folder in enumerate(folders):
            num_pictures = 0
            for entry in fs.walk(self._root, folder):
                if extension(entry.path) in PICTURE_EXTENSIONS:
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
        """Path and size. Contents would mean to read the whole raw set once more; times change when it is copied."""
        path, size = item.place
        return f"{path}\0{size}"

    def open(self, item: Item) -> BinaryIO:
        path, size = item.place
        return fs.open_item(fs.join(self._root, path), size)


def _item(entry: fs.Entry, label: int) -> Item:
    key, problem = checked_key(os.path.splitext(entry.path)[0])
    place = [entry.path, entry.size]
    return Item(key, readable(entry.path), place, label, problem=entry.problem or problem)
