"""Records that came into a run folder with a copy: they are about the jobs and processes of the original.

Claims and submissions name the folder in which they were made. A folder that was moved has taken its records along. One
that was copied holds the same records as its original, whose process or job must not be taken for the copy's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from pomscale.runs.layout import JOB_FILE


def original_of(folder: Path, made_in: str | None, holds: Callable[[Path], bool]) -> Path | None:
    """Return the folder that a record belongs to, if it has come into this folder with a copy; else None.

    Args:
        folder: the run folder in which the record was found.
        made_in: path of the run folder that the record names; None in a record of an older version, which named none.
        holds: whether the run folder at a path has the same record.
    """
    path = made_in if made_in is not None else _launched_in(folder)
    if path is None:
        return None
    original = Path(path)
    try:
        # Where the record was made there is nothing, or another run by now: this folder was moved from there.
        is_copy = not original.samefile(folder) and holds(original)
    except PermissionError:  # the run of somebody else
        is_copy = True
    except OSError:
        is_copy = False
    return original if is_copy else None


def _launched_in(folder: Path) -> str | None:
    """Return the path of the job folder when a job was last launched in it."""
    try:
        launched_in = json.loads((folder / JOB_FILE).read_bytes())["home"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return launched_in if isinstance(launched_in, str) else None
