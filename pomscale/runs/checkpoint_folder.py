"""One checkpoint on disk: how it comes to be, when it counts, and how it goes. No torch; rank 0 does all of this.

    samples-000000012800.g00003.partial/   being written by the third start of the run, or left by a kill
    samples-000000012800/                  complete, if the marker is in it; without, the remains of a deletion
    samples-000000012800.damaged/          complete once, now not what was written: kept to be looked at, never loaded

A checkpoint is written under a name of its own and gets its final name, in one rename, after everything in it has
reached the disk. A complete one is never written to again: a kill in the middle of an overwrite could leave the old
.metadata over new, torn shards.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pomscale.base.errors import PomscaleError
from pomscale.base.files import sync_folder, write_text
from pomscale.runs.integrity import Checksum
from pomscale.runs.layout import CHECKPOINT_META, MARKER

_FINAL = re.compile(r"samples-(\d{12})$")
_PARTIAL = re.compile(r"samples-\d{12}\.g(\d+)\.partial$")


def final_folder(root: Path, samples: int) -> Path:
    return root / f"samples-{samples:012d}"


def samples_of(folder: Path) -> int:
    """Of a folder with a final name."""
    return int(folder.name.removeprefix("samples-"))


def partial_folder(folder: Path, start: int) -> Path:
    """Where the start number `generation` of a run writes what will be `folder`."""
    return folder.with_name(f"{folder.name}.g{start:05d}.partial")


def is_complete(folder: Path) -> bool:
    return (folder / MARKER).is_file()


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints below `root`, oldest first."""
    return [path for path in _folders(root, _FINAL) if is_complete(path)]


def incomplete_checkpoints(root: Path) -> list[Path]:
    """Half written and half deleted ones."""
    return _folders(root, _PARTIAL) + [path for path in _folders(root, _FINAL) if not is_complete(path)]


def remains(root: Path, start: int) -> list[Path]:
    """What starts of the run before number `generation` left half written, and whoever it was half deleted."""
    return [path for path in incomplete_checkpoints(root) if _start(path) < start]


def _folders(root: Path, name: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in root.glob("samples-*") if name.match(path.name))


def _start(incomplete: Path) -> int:
    partial = _PARTIAL.match(incomplete.name)
    return int(partial[1]) if partial else -1


def begin(partial: Path, meta: Mapping[str, Any]) -> Checksum:
    """An empty `partial` with its checkpoint.json, whose checksum is returned."""
    remove(partial)  # a save of ours at the same samples that failed
    partial.mkdir(parents=True)
    text = json.dumps(meta, indent=1)
    write_text(partial / CHECKPOINT_META, text)
    return Checksum.of(text.encode())


def commit(partial: Path, folder: Path) -> None:
    """`partial`, sealed, becomes `folder`. OSError, and nothing is changed, if there is one."""
    sync_folder(partial)
    partial.rename(folder)  # the check and the deed in one step
    sync_folder(folder.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint folder. The marker goes first: a kill in between leaves an ignored folder, not a torn one."""
    if folder.exists():
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is kept but never loaded; where it is now."""
    aside = folder.with_name(f"{folder.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged-{number}")
    try:
        folder.rename(aside)
        sync_folder(folder.parent)
    except OSError as error:
        raise PomscaleError(f"{folder} is damaged and could not be renamed ({error}); move it away yourself") from error
    return aside
