"""The output folder of a dataset that is made from others, and how its manifest names those."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError
from pomscale.base.files import make_folder, remove_leftovers, write_text
from pomscale.shards.schema import Manifest

# Recipe of the dataset that is being made in a folder without a manifest.
_MARKER_NAME = "unfinished.json"


def origin_of(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Return the entry for a dataset in the recipe of one that is made from it."""
    return {"path": str(folder.resolve()), "fingerprint": manifest.fingerprint}


@contextmanager
def new_dataset(output: Path, recipe: dict[str, Any]) -> Iterator[None]:
    """Reserve `output` for a dataset while the block runs, which writes the manifest last.

    A command that was killed may be repeated: it begins again in the same folder. Raises InputError if the folder holds
    anything else.
    """
    text = json.dumps(recipe, sort_keys=True)
    marker = output / _MARKER_NAME
    make_folder(output)
    if any(output.iterdir()) and not (marker.exists() and marker.read_text(encoding="utf-8") == text):
        raise InputError(f"{output}: is not empty; choose another output, or delete it")
    remove_leftovers(output)
    write_text(marker, text)
    yield
    marker.unlink()
