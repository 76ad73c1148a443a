"""The table that joins a companion set (text embeddings) to a dataset.

Sets with the same keys in the same order need no table. For others `pomscale data join` writes one into the companion's
folder: one row number of the companion per record of the main set, NO_ROW where it has none.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pomscale.base.errors import InputError
from pomscale.shards.class_names import check_companion_classes
from pomscale.shards.index import map_index
from pomscale.shards.location import local_folder
from pomscale.shards.schema import Manifest

NO_ROW = -1


def join_path(companion_folder: str | Path, main: Manifest) -> Path:
    """Return the path of the table for a main set."""
    return Path(companion_folder) / f"join-{main.keys_sha256[:12]}.npy"


def open_join(main_location: str, main: Manifest, companion_location: str, companion: Manifest) -> np.ndarray | None:
    """Return the table, memory-mapped, int64 (records of main,); None where row i belongs to record i.

    Raises InputError, naming the remedy, if the classes differ, or a table is needed and missing, or has another size.
    """
    check_companion_classes(main_location, main, companion_location, companion)
    if main.keys_sha256 == companion.keys_sha256:
        return None
    folder = local_folder(companion_location)
    if folder is None:
        raise InputError(
            f"dataset {companion_location}: its records are not those of {main_location}, so a table has to join them, "
            f"which must lie on a disk; copy the companion to a folder and {join_remedy(main_location, 'FOLDER')}"
        )
    path = join_path(folder, main)
    try:
        return map_index(path, main.num_samples, np.dtype("<i8"))
    except (OSError, ValueError) as error:
        reason = error if isinstance(error, OSError) else f"it is no table of {main.num_samples:,} rows"
        raise InputError(
            f"{path}: cannot be read: {reason}; {join_remedy(main_location, companion_location)}"
        ) from error


def join_remedy(main_location: str, companion_location: str) -> str:
    """Return the remedy for a missing or wrong table."""
    return f"run `pomscale data join {main_location} {companion_location}`"
