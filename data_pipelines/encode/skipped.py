"""What items that could not be encoded mean for the exit code: the same for encode, verify and repair."""

from __future__ import annotations

from data_pipelines.derive.derived import is_derived
from pomscale.shards.schema import Manifest


def skipped_exit_code(num_skipped: int, max_skipped: int) -> int:
    """3: done, but more items were skipped (and listed) than the recipe puts up with. Else 0."""
    return 3 if num_skipped > max_skipped else 0


def max_skipped_of(manifest: Manifest) -> int:
    """How many skipped items the recipe of a dataset puts up with.

    A set that was made from others lists what those lack. It has skipped nothing, and those were judged by theirs.
    """
    if is_derived(manifest):
        return manifest.num_failures
    return int(manifest.recipe.get("max_skipped", 0))  # sets of older releases know no such key
