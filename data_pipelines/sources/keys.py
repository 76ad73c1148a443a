"""Names that can be keys in shards, and texts that can be written."""

from __future__ import annotations

import re

from pomscale.shards.schema import ARRAY_MEMBERS

# A ustar header holds 100 bytes of file name and 155 of folders; the longest member suffix must fit in as well.
MAX_NAME_BYTES = 100 - max(map(len, ARRAY_MEMBERS.values()))
MAX_FOLDER_BYTES = 155

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def checked_key(name: str) -> tuple[str, str | None]:
    """The key of a name (a path without extension, a column's value), and why it cannot be stored, or None.

    WebDataset splits a member's name at its first dot, so a key has none. Also where the name cannot be stored, the key
    is a text that can be listed.
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
    """Whether it can be written as UTF-8: not the name of a file, or a cell, that was something else."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(value: str) -> str:
    r"""The text on one line: what is not UTF-8, and control characters, as \xNN."""
    text = value if is_text(value) else value.encode(errors="backslashreplace").decode().replace(r"\udc", r"\x")
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
