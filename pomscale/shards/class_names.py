"""Names of classes wherever two datasets meet, or a dataset and a model: class ids mean something by their names alone.

Two sets may have as many classes in another order, and every label would then be another one without an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pomscale.base.errors import InputError
from pomscale.shards.schema import Manifest

_REMEDY = (
    "Encode one of them again with the other's classes: class folders of the same names, or one file of names for both "
    "(source.class_names)"
)


def class_difference(here: Sequence[str], there: Sequence[str]) -> str | None:
    """Return the first class id whose name differs, for people; None if all names are equal."""
    for number in range(max(len(here), len(there))):
        name, other = (repr(names[number]) if number < len(names) else "missing" for names in (here, there))
        if name != other:
            return f"class {number} is {name} here and {other} there"
    return None


def check_same_classes(here: str, names: Sequence[str], there: str, names_there: Sequence[str]) -> None:
    """Raise InputError, saying the first class that differs and the remedy, if two sets have different classes.

    Args:
        here: The one set in words, e.g. "dataset PATH".
        names: Its class names in the order of their ids.
        there: The other set in words.
        names_there: Its class names.
    """
    difference = class_difference(names, names_there)
    if difference is not None:
        raise InputError(f"{here}: its classes are not those of {there}: {difference}. {_REMEDY}")


def check_companion_classes(
    main_location: str | Path, main: Manifest, companion_location: str | Path, companion: Manifest
) -> None:
    """Raise InputError if a companion has classes of its own that are not those of the main set.

    Equal keys would then join records of different classes, so one of the sets belongs to something else.
    """
    if main.class_names and companion.class_names:
        check_same_classes(
            f"dataset {companion_location}", companion.class_names, f"dataset {main_location}", main.class_names
        )
