"""Names of limited length."""

from __future__ import annotations

import hashlib

MAX_NAME_BYTES = 240
"""Most bytes of a name that becomes a folder: file systems take 255, and some folders have a prefix such as encode-."""

_DIGEST = 10


def shortened(name: str, most: int) -> str:
    """Return a name of at most `most` bytes: itself, or its beginning and a checksum of the whole.

    Different names stay different, and the same name always becomes the same.
    """
    encoded = name.encode()
    if len(encoded) <= most:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:_DIGEST]
    return f"{encoded[: most - _DIGEST - 1].decode(errors='ignore')}-{digest}"
