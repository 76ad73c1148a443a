"""Captions and class ids as sources give them, checked."""

from __future__ import annotations

from typing import Any

from data_pipelines.sources import fs
from data_pipelines.sources.keys import is_text
from pomscale.base.errors import InputError

# Without a file of names every id up to the largest is a class, so a column of other numbers must not pass for ids.
MAX_CLASSES = 1_000_000


def decode_text(content: bytes) -> str:
    """The text of a file; what is not UTF-8 is found by `checked_caption`."""
    return content.decode("utf-8-sig", errors="surrogateescape")


def checked_caption(value: Any) -> tuple[str | None, str | None]:
    """The caption without white space around it, and why there is none, or None."""
    if value is None:
        return None, "its caption is missing"
    if not isinstance(value, str):
        return None, f"its caption is no text but {value!r:.40}"
    if not is_text(value):
        return None, "its caption is not UTF-8"
    caption = value.strip()
    return (caption, None) if caption else (None, "its caption is empty")


class ClassIds:
    """Checks class ids against a file of names, or counts them."""

    def __init__(self, names_file: str | None) -> None:
        self._file = names_file
        self._names: tuple[str, ...] | None = None
        self._largest = -1

    def begin(self) -> None:
        """Reads the names. InputError if that is impossible."""
        self._largest = -1
        if self._file is not None:
            lines = decode_text(fs.read_file(self._file)).rstrip().splitlines()
            self._names = tuple(line.strip() for line in lines)
            if not self._names or not all(name and is_text(name) for name in self._names):
                raise InputError(f"source.class_names: {self._file} must have one class name in UTF-8 on every line")

    @property
    def names(self) -> tuple[str, ...]:
        """By id. Without a file they are "0" to the largest id that was checked."""
        return self._names or tuple(map(str, range(self._largest + 1)))

    def checked(self, value: Any) -> tuple[int | None, str | None]:
        """The class id, and why there is none, or None."""
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
    """Also of text, and of 3.0: tables turn whole numbers into those where some are missing."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() and number >= 0 and not isinstance(value, bool) else None
