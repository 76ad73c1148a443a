"""The fields of an item as sources give them, checked: columns of a table, keys, captions and classes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from pomscale.base.errors import InputError
from pomscale.shards.schema import ARRAY_MEMBERS, MAX_CAPTIONS
from pomscale.sources import storage
from pomscale.sources.protocol import Caption

# A ustar header holds 100 bytes of file name and 155 of folders; the longest member suffix must fit in as well.
MAX_NAME_BYTES = 100 - max(map(len, ARRAY_MEMBERS.values()))
MAX_FOLDER_BYTES = 155

# Without a file of names every id up to the largest is a class, so a column of other numbers must not pass for ids.
MAX_CLASSES = 1_000_000

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_DECIMAL = re.compile(r"\s*[+-]?[0-9]+(\.[0-9]*)?\s*")

# str.splitlines also splits at characters that a caption or a name may hold, and all class ids after it would be wrong.
_NEWLINE = re.compile(r"\r\n|\n|\r")


# -- columns of a table ------------------------------------------------------------------------------------------------


def check_columns(path: str, wanted: Collection[str], present: Sequence[str]) -> None:
    """Raise InputError if a wanted column is missing, or if two have its name, so that one would be taken by chance."""
    for column in wanted:
        if column not in present:
            columns = ", ".join(present) or "none"
            raise InputError(f"source: {path} has no column {column!r}; its columns are {columns}")
        if present.count(column) > 1:
            raise InputError(f"source: {path} has {present.count(column)} columns {column!r}; rename all but one")


# -- keys and other names ----------------------------------------------------------------------------------------------


def checked_key(name: str) -> tuple[str, str | None]:
    """Return the key of a name (a path without extension, a column's value), and why it cannot be stored, or None.

    WebDataset splits a member's name at its first dot, so a key has none. Where the name cannot be stored, the key is
    still a text that can be listed.
    """
    key = readable(name).replace(".", "_")
    folder, _, base = key.rpartition("/")
    problem = None
    if not is_text(name):
        problem = f"the name {key} is not UTF-8; rename it"
    elif _CONTROL.search(name):
        problem = f"the name {key} has control characters; rename it"
    elif not base or key[0] == "/" or "//" in key:
        problem = f"the name {key!r} has an empty part; rename it"
    elif len(base.encode()) > MAX_NAME_BYTES or len(folder.encode()) > MAX_FOLDER_BYTES:
        problem = (
            f"the name is too long for a tar header: at most {MAX_NAME_BYTES} bytes of file name and "
            f"{MAX_FOLDER_BYTES} of folders; rename it"
        )
    return key, problem


def is_text(value: str) -> bool:
    """Return whether a name or a cell can be written as UTF-8; those with undecodable bytes cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(value: str) -> str:
    r"""Return the text on one line, with undecodable bytes and control characters as \xNN."""
    text = value if is_text(value) else value.encode(errors="backslashreplace").decode().replace(r"\udc", r"\x")
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


# -- objects in JSON ---------------------------------------------------------------------------------------------------


def parse_object(content: bytes) -> dict[str, Any] | str:
    """Return a JSON object by name; or, as a text, the reason why it cannot be told, as the end of a sentence."""
    try:
        found = json.loads(content, object_pairs_hook=_distinct)
    except _NamedTwiceError as error:
        return f"names {error} twice"
    except (ValueError, RecursionError):
        return "is no JSON"
    return found if isinstance(found, dict) else "is no JSON object"


class _NamedTwiceError(Exception):
    """A name is twice in one JSON object."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _NamedTwiceError(repr(next(name for name in names if names.count(name) > 1)))
    return found


# -- captions ----------------------------------------------------------------------------------------------------------


def decode_text(content: bytes) -> str:
    """Return the text of a file; `checked_caption` finds bytes that are not UTF-8."""
    return content.decode("utf-8-sig", errors="surrogateescape")


def checked_caption(value: Any, lines: bool = False) -> tuple[Caption, str | None]:
    """Return the caption without white space around it, and why there is none, or None.

    A list has a caption in each element that is not empty; with `lines`, a text has one in each such line.
    """
    if value is None:
        return None, "its caption is missing"
    if isinstance(value, str) and lines:
        value = _NEWLINE.split(value)
    captions = value if isinstance(value, list) else [value]
    found = []
    for caption in captions:
        if caption is not None and not isinstance(caption, str):
            return None, f"its caption is no text but {caption!r:.40}"
        if caption and not is_text(caption):
            return None, "its caption is not UTF-8"
        if caption and caption.strip():
            found.append(caption.strip())
    if not found:
        return None, "its caption is empty"
    if len(found) > MAX_CAPTIONS:
        return None, f"it has {len(found):,} captions, more than the {MAX_CAPTIONS} that a record can hold"
    return found if len(found) > 1 else found[0], None


# -- classes -----------------------------------------------------------------------------------------------------------


class ClassIds:
    """Checks class ids against a file of names, or counts them where there is no such file."""

    def __init__(self, names_file: str | None) -> None:
        self._file = names_file
        self._names: tuple[str, ...] | None = None
        self._largest = -1

    def begin(self) -> None:
        """Read the names. Raises InputError if the file cannot be read or has an empty line."""
        self._largest = -1
        if self._file is not None:
            lines = _NEWLINE.split(decode_text(storage.read_file(self._file)).rstrip())
            self._names = tuple(line.strip() for line in lines)
            if not self._names or not all(name and is_text(name) for name in self._names):
                raise InputError(f"source.class_names: {self._file} must have one class name in UTF-8 on every line")

    @property
    def names(self) -> tuple[str, ...]:
        """Class names by id; "0" to the largest id that was checked where there is no file of names."""
        return self._names or tuple(map(str, range(self._largest + 1)))

    def checked(self, value: Any) -> tuple[int | None, str | None]:
        """Return the class id, and why there is none, or None."""
        if value is None or value == "":
            return None, "its class is missing"
        label = _whole_number(value)
        if label is None:
            return None, f"its class {value!r:.40} is no class id (0, 1, ...)"
        limit = MAX_CLASSES if self._names is None else len(self._names)
        if label >= limit:
            return None, f"its class {label} is not among the {limit:,} classes" + (
                f" of {self._file}" if self._file else "; if it is an id, name the classes in source.class_names"
            )
        self._largest = max(self._largest, label)
        return label, None


def _whole_number(value: Any) -> int | None:
    """Return the whole number that a number or a text stands for, or None.

    3.0 stands for 3: tables store whole numbers as floating point where some are missing. Python reads more texts as
    numbers (1_0, 1e2), which are rather names of classes.
    """
    if isinstance(value, str) and not _DECIMAL.fullmatch(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() and number >= 0 and not isinstance(value, bool) else None
