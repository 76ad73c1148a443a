"""The one checkpoint of a sweep: it stays the same, also while its run goes on and deletes checkpoints.

FOLDER/source                    the SOURCE of the sweep, so that its results are never mixed with another one's
FOLDER/samples-000000012800/     links to the files of the checkpoint, until every point has a result
"""

from __future__ import annotations

from pathlib import Path

from pomscale.base.errors import InputError
from pomscale.base.files import write_text
from pomscale.runs.checkpoint_folder import complete_checkpoints, final_folder, is_complete, link, remove, samples_of
from pomscale.runs.layout import CHECKPOINTS_FOLDER

_SOURCE = "source"


def frozen_source(source: Path, folder: Path, *, is_done: bool) -> Path:
    """Return what the points of the sweep in `folder` are to measure.

    A run stands for its newest complete checkpoint when the sweep began, whose files are linked into the folder. What
    is neither a run nor a checkpoint of one, such as an exported folder, is returned as it is.

    Args:
        source: The run, checkpoint or exported folder.
        folder: The folder of the sweep.
        is_done: Whether every point has a result, so that the files are not needed.

    Raises:
        InputError: The folder holds a sweep over another source, or its checkpoint is gone.
    """
    known = folder / _SOURCE
    checkpoints = complete_checkpoints(source / CHECKPOINTS_FOLDER)
    if known.is_file():
        before, _, name = known.read_text(encoding="utf-8").strip().partition("\n")
        if before != str(source.resolve()):
            raise InputError(f"{folder}: holds a sweep over {before}; give another --work")
        checkpoint = next((path for path in checkpoints if path.name == name), source if name == source.name else None)
    else:
        checkpoint = checkpoints[-1] if checkpoints else source
        name = checkpoint.name if is_complete(checkpoint) else ""
        write_text(known, f"{source.resolve()}\n{name}\n")
    if not name:
        return source
    linked = folder / name
    if not is_done and not is_complete(linked) and (checkpoint is None or not link(checkpoint, linked)):
        raise InputError(f"{source}: checkpoint {name} of this sweep is gone; give another --work")
    return linked


def release_source(folder: Path) -> None:
    """Let the files of the checkpoint go, since every point has a result."""
    for checkpoint in complete_checkpoints(folder):
        remove(final_folder(folder, samples_of(checkpoint)))
