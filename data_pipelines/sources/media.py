"""Which files are pictures or clips: by their extension, since a scan does not open them."""

from __future__ import annotations

import os

PICTURE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp"})
CLIP_EXTENSIONS = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v"})


def extension(path: str) -> str:
    """The last one, in lower case, with its dot; '' if there is none."""
    return os.path.splitext(path)[1].lower()
