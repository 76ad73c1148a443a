"""A folder with one subfolder of pictures per class."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pomscale.errors import InputError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp"})

# A ustar header holds 100 bytes of file name and 155 of folders; the longest member suffix must fit in as well.
_MAX_NAME_BYTES = 100 - len(".latent_flip.npy")
_MAX_FOLDER_BYTES = 155


@dataclass(frozen=True, slots=True)
class Item:
    key: str  # name in the shards
    path: str  # relative to the source's root
    label: int


@dataclass(frozen=True)
class ImageFolder:
    """The pictures of a class folder, in a stable order: classes sorted, then paths sorted."""

    root: Path
    class_names: tuple[str, ...]
    items: tuple[Item, ...]
    num_ignored: int  # files that are no PNG, JPEG or WebP
    fingerprint: str


def scan_image_folder(root: Path) -> ImageFolder:
    """Lists root/CLASS/**/*.{png,jpg,jpeg,webp}. Hidden class folders are left out.

    The fingerprint is a sha256 over relative paths and file sizes. Contents are not hashed: that would read the whole
    raw set once more, and times are left out since copying a set changes them.
    InputError if the folder is missing or cannot be read, has no class folders, one is empty, or a picture has a name
    that cannot be stored or gives two pictures the same key.
    """
    try:
        return _scan(root)
    except OSError as error:
        raise InputError(f"source.path: cannot read {error.filename}: {error.strerror}; mend or remove it") from error


def _scan(root: Path) -> ImageFolder:
    if not root.is_dir():
        raise InputError(f"source.path: there is no folder {root}")
    class_names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
    if not class_names:
        raise InputError(f"source.path: {root} has no class folders; put the pictures in one subfolder per class")

    digest = hashlib.sha256()
    items: list[Item] = []
    num_ignored = sum(entry.is_file() for entry in os.scandir(root))
    empty = []
    for label, class_name in enumerate(class_names):
        pictures, others = _list_pictures(root / class_name)
        num_ignored += others
        if not pictures:
            empty.append(class_name)
        for path, size in pictures:
            relative = path.relative_to(root).as_posix()
            items.append(Item(_key(relative), relative, label))
            digest.update(f"{relative}\0{size}\n".encode())
    if empty:
        raise InputError(
            f"source.path: no PNG, JPEG or WebP in class folder(s) {', '.join(empty)} of {root}; "
            f"add pictures or delete the folder, since every folder is a class"
        )
    _refuse_collisions(items)
    return ImageFolder(root, tuple(class_names), tuple(items), num_ignored, digest.hexdigest())


def _list_pictures(folder: Path) -> tuple[list[tuple[Path, int]], int]:
    """Pictures below a folder, sorted, with their sizes in bytes; and the number of other files."""
    pictures, num_others = [], 0
    for parent, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower() in EXTENSIONS:
                pictures.append((path, path.stat().st_size))
            else:
                num_others += 1
    return sorted(pictures), num_others


def _raise(error: OSError) -> NoReturn:
    raise error


def _key(relative: str) -> str:
    """Relative path without extension. WebDataset splits a name at its first dot, so a key has none."""
    try:
        relative.encode()
    except UnicodeEncodeError:
        raise InputError(f"source.path: the name {os.fsencode(relative)!r} is not UTF-8; rename it") from None
    key = os.path.splitext(relative)[0].replace(".", "_")
    folder, _, name = key.rpartition("/")
    if len(name.encode()) > _MAX_NAME_BYTES or len(folder.encode()) > _MAX_FOLDER_BYTES:
        raise InputError(
            f"source.path: the name of {relative} is too long for a tar header; at most {_MAX_NAME_BYTES} bytes "
            f"of file name and {_MAX_FOLDER_BYTES} of folders"
        )
    return key


def _refuse_collisions(items: list[Item]) -> None:
    paths: dict[str, str] = {}
    for item in items:
        other = paths.setdefault(item.key, item.path)
        if other != item.path:
            raise InputError(
                f"source.path: {other} and {item.path} would both be stored under the key {item.key}; rename one"
            )
