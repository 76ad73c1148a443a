"""What all points of a sweep share: one checkpoint, also while its run goes on and deletes checkpoints, and options.

FOLDER/sweep-of.json             source, checkpoint and options, so that results are never mixed with another sweep's
FOLDER/samples-000000012800/     links to the files of the checkpoint, until every point has a result
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pomscale.base.errors import InputError
from pomscale.base.files import write_text
from pomscale.runs.checkpoint_folder import complete_checkpoints, final_folder, is_complete, link, remove, samples_of
from pomscale.runs.layout import CHECKPOINTS_FOLDER

_SHARED = "sweep-of.json"


def is_begun(folder: Path) -> bool:
    """Return whether `folder` holds a sweep, so that its source and options are decided."""
    return (folder / _SHARED).is_file()


def frozen_source(source: Path, folder: Path, options: Mapping[str, str], *, is_done: bool) -> Path:
    """Return what the points of the sweep in `folder` are to measure.

    A run stands for its newest complete checkpoint when the sweep began, whose files are linked into the folder. What
    is neither a run nor a checkpoint of one, such as an exported folder, is returned as it is.

    Args:
        source: The run, checkpoint or exported folder.
        folder: The folder of the sweep.
        options: The options of all its points, by name, where they are not the default.
        is_done: Whether every point has a result, so that the files are not needed.

    Raises:
        InputError: The folder holds a sweep over another source or with other options, or its checkpoint is gone.
    """
    known = folder / _SHARED
    checkpoints = complete_checkpoints(source / CHECKPOINTS_FOLDER)
    if known.is_file():
        name = _checked(known, str(source.resolve()), options)
        checkpoint = next((path for path in checkpoints if path.name == name), source if name == source.name else None)
    else:
        checkpoint = checkpoints[-1] if checkpoints else source
        name = checkpoint.name if is_complete(checkpoint) else ""
        shared = {"source": str(source.resolve()), "checkpoint": name, "options": dict(options)}
        write_text(known, json.dumps(shared, indent=1))
    if not name:
        return source
    linked = folder / name
    if not is_done and not is_complete(linked) and (checkpoint is None or not link(checkpoint, linked)):
        raise InputError(f"{source}: checkpoint {name} of this sweep is gone; give another --work")
    return linked


def _checked(known: Path, source: str, options: Mapping[str, str]) -> str:
    """Return the name of the checkpoint. InputError if the sweep is over another source or has other options."""
    try:
        shared = json.loads(known.read_text(encoding="utf-8"))
        before, name, others = shared["source"], str(shared["checkpoint"]), dict(shared["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{known}: is damaged ({error!r}); delete {known.parent}, or give another --work") from error
    if before != source:
        raise InputError(f"{known.parent}: holds a sweep over {before}; give another --work")
    differing = [f"--{option}" for option in sorted({*options, *others}) if options.get(option) != others.get(option)]
    if differing:
        raise InputError(
            f"{known.parent}: holds a sweep with another {', '.join(differing)}, and its points would be compared with "
            f"these; give another --work"
        )
    return name


def release_source(folder: Path) -> None:
    """Let the files of the checkpoint go, since every point has a result."""
    for checkpoint in complete_checkpoints(folder):
        remove(final_folder(folder, samples_of(checkpoint)))
