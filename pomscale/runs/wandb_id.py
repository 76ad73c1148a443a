"""The wandb run of a run folder: its id in wandb_id.txt; where that was drawn, and ids of before, in wandb_ids.json.

A run has one wandb run over all its starts. It gets another one where the id cannot be its own any longer: in a copy of
a run folder, since two runs would be logged into one, and once the wandb run was deleted on the server, which refuses
its id for good. What wandb has recorded under the ids of before stays with them.
"""

from __future__ import annotations

import json
import logging
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pomscale.base.errors import InputError
from pomscale.base.files import write_text
from pomscale.runs.layout import WANDB_ID_FILE, WANDB_IDS_FILE
from pomscale.runs.original import original_of

WANDB_RUN_DELETED = "previously created and deleted"
"""Part of what wandb's server answers, with status 409, to the id of a run that was deleted there."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Ids:
    """Content of wandb_ids.json. home: where the id was drawn. left: ids of before, and why they were left."""

    home: str | None = None
    left: dict[str, str] = field(default_factory=dict)


def read_wandb_id(run_folder: Path) -> str | None:
    """Return the id in wandb_id.txt; None if there is none."""
    path = run_folder / WANDB_ID_FILE
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def own_wandb_id(run_folder: Path) -> str:
    """Return the id of this folder's wandb run, which is drawn at the first call, and again in a copy of the folder."""
    found, ids = read_wandb_id(run_folder), _read_ids(run_folder)
    if found is None or found in ids.left:
        return _draw(run_folder, ids.left)
    reason = _copied_from(run_folder, found, ids)
    if reason is not None:
        return replace_wandb_id(run_folder, reason)
    if ids.home != (home := str(run_folder.absolute())):  # of an older version, or moved
        _write_ids(run_folder, _Ids(home, ids.left))
    return found


def replace_wandb_id(run_folder: Path, reason: str) -> str:
    """Draw another id, and return it. `reason` completes "the wandb run ID is not continued: "."""
    found = read_wandb_id(run_folder)
    assert found is not None
    new = _draw(run_folder, {**_read_ids(run_folder).left, found: reason})
    logger.warning(
        "%s: the wandb run %s is not continued: %s. From now on it is the wandb run %s; metrics.jsonl has all rows",
        run_folder,
        found,
        reason,
        new,
    )
    return new


def left_wandb_ids(run_folder: Path) -> dict[str, str]:
    """Return the ids whose recordings in this folder are not to be uploaded from here, and why."""
    found, ids = read_wandb_id(run_folder), _read_ids(run_folder)
    reason = None if found is None else _copied_from(run_folder, found, ids)
    return ids.left if found is None or reason is None else {**ids.left, found: reason}


def _copied_from(run_folder: Path, wandb_id: str, ids: _Ids) -> str | None:
    """Return the reason why the id is not this folder's, if it came into it with a copy."""
    original = original_of(run_folder, ids.home, lambda other: read_wandb_id(other) == wandb_id)
    return None if original is None else f"it is that of {original}, and this folder is a copy"


def _draw(run_folder: Path, left: dict[str, str]) -> str:
    new = secrets.token_hex(8)
    # In this order: after a kill in between, the id that is left is known, and drawn again.
    _write_ids(run_folder, _Ids(str(run_folder.absolute()), left))
    write_text(run_folder / WANDB_ID_FILE, new + "\n")
    return new


def _read_ids(run_folder: Path) -> _Ids:
    path = run_folder / WANDB_IDS_FILE
    if not path.exists():  # of an older version
        return _Ids()
    try:
        return _Ids(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged: {error}; delete it") from error


def _write_ids(run_folder: Path, ids: _Ids) -> None:
    write_text(run_folder / WANDB_IDS_FILE, json.dumps(asdict(ids), indent=1))
