"""Names of folders: of limited length, and of values that may have any characters."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable

MAX_NAME_BYTES = 240
"""Most bytes of a name that becomes a folder: file systems take 255, and some folders have a prefix such as encode-."""

_DIGEST, _SHORT_DIGEST = 10, 6


def shortened(name: str, most: int) -> str:
    """Return a name of at most `most` bytes: itself, or its beginning and a checksum of the whole.

    Different names stay different, and the same name always becomes the same.
    """
    encoded = name.encode()
    if len(encoded) <= most:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:_DIGEST]
    return f"{encoded[: most - _DIGEST - 1].decode(errors='ignore')}-{digest}"


def folder_words(texts: Iterable[str], strip: str = "_") -> dict[str, str]:
    """Return text -> word of a folder's name that stands for it, of letters, digits, `.`, `-` and `_`.

    Runs of other characters become `_`, which is cut off at the ends together with the others of `strip`. Different
    texts have different words: of those that would share one, each that is not the word itself gets a checksum.
    """
    words = {text: re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip(strip) for text in texts}
    shared = Counter(words.values())
    return {
        text: word if word == text or (word and shared[word] == 1) else f"{word}-{_checksum(text)}".lstrip("-")
        for text, word in words.items()
    }


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_SHORT_DIGEST]
