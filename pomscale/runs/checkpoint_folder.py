"""One checkpoint on disk: how it is made, when it is complete, and how it is deleted, all by rank 0. No torch.

    samples-000000012800.g00003.partial/   the third start of the run writes it, or left it when it was killed
    samples-000000012800/                  complete if the marker is in it; else left over by a deletion
    samples-000000012800.damaged/          complete once, and damaged since: kept for people, never loaded

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
from pomscale.base.files import link_or_copy, make_folder, sync_folder, write_text
from pomscale.runs.integrity import Checksum
from pomscale.runs.layout import CHECKPOINT_META, MARKER

_FINAL = re.compile(r"samples-(\d{12})$")
_PARTIAL = re.compile(r"samples-\d{12}\.g(\d+)\.partial$")


def final_folder(root: Path, samples: int) -> Path:
    """Return the folder of the complete checkpoint after `samples` samples."""
    return root / f"samples-{samples:012d}"


def samples_of(folder: Path) -> int:
    """Return the samples seen by the checkpoint in a folder with a final name."""
    return int(folder.name.removeprefix("samples-"))


def partial_folder(folder: Path, start: int) -> Path:
    """Return the folder in which start number `start` of a run writes what will become `folder`."""
    return folder.with_name(f"{folder.name}.g{start:05d}.partial")


def is_complete(folder: Path) -> bool:
    """Whether the marker is in a folder."""
    return (folder / MARKER).is_file()


def complete_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints below `root`, oldest first."""
    return [path for path in _folders(root, _FINAL) if is_complete(path)]


def incomplete_checkpoints(root: Path) -> list[Path]:
    """Return the folders of checkpoints that are half written or half deleted."""
    return _folders(root, _PARTIAL) + [path for path in _folders(root, _FINAL) if not is_complete(path)]


def remains(root: Path, start: int) -> list[Path]:
    """Return what starts of the run before number `start` left half written, and all that is half deleted."""
    return [path for path in incomplete_checkpoints(root) if _start(path) < start]


def _folders(root: Path, name: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in root.glob("samples-*") if name.match(path.name))


def _start(incomplete: Path) -> int:
    partial = _PARTIAL.match(incomplete.name)
    return int(partial[1]) if partial else -1


def begin(partial: Path, meta: Mapping[str, Any]) -> Checksum:
    """Make an empty folder `partial` with its checkpoint.json, and return the checksum of that file."""
    remove(partial)  # a save of ours at the same samples that failed
    partial.mkdir(parents=True)
    text = json.dumps(meta, indent=1)
    write_text(partial / CHECKPOINT_META, text)
    return Checksum.of(text.encode())


def commit(partial: Path, folder: Path) -> None:
    """Rename `partial`, which is sealed, to `folder`. Raises OSError and changes nothing if `folder` exists."""
    sync_folder(partial)
    partial.rename(folder)  # checks and renames in one step
    sync_folder(folder.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint folder. The marker goes first: a kill in between leaves an ignored folder, not a torn one."""
    if folder.exists():
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder)


def link(checkpoint: Path, target: Path) -> bool:
    """Link a checkpoint's files into `target`. Return False if retention has begun to delete it, marker first.

    The files stay there after retention has deleted the checkpoint. PomscaleError if they cannot be linked or copied.
    """
    remove(target)
    make_folder(target)
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER]
    try:
        for path in (*files, checkpoint / MARKER):
            copy = target / path.relative_to(checkpoint)
            make_folder(copy.parent)
            link_or_copy(path, copy)
    except (FileNotFoundError, PomscaleError):
        remove(target)
        if (checkpoint / MARKER).is_file():
            raise
        return False
    return True


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is kept but never loaded, and return its new path."""
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
