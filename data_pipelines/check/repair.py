"""Make the bad shards of a dataset again, and only those."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.check.verify import VerifyReport, verify
from data_pipelines.encode.encode import EncodeReport, check_source_in_place, encode
from data_pipelines.shards.parts import PARTS_FOLDER, part_of
from pomscale.base.errors import InputError
from pomscale.base.files import make_folder, write_text
from pomscale.config.encode import EncodeRecipe
from pomscale.config.load import load_encode_recipe
from pomscale.config.yaml_file import dump_yaml
from pomscale.shards.schema import MANIFEST_NAME, Manifest, read_manifest

# Recipe of an unfinished repair: while shards are missing there is no manifest that has it.
_RECIPE_NAME = "repair.yaml"


@dataclass(frozen=True)
class RepairReport:
    """Outcome of a repair."""

    found: VerifyReport | None
    """Problems before it; None where an earlier repair was resumed."""
    encoded: EncodeReport | None
    """Outcome of the encode; None where there was nothing to repair."""
    left: VerifyReport
    """Problems after it."""

    @property
    def exit_code(self) -> int:
        """Exit code as of verify and encode: 3 where more items of the source failed than its recipe allows."""
        return self.left.exit_code or (self.encoded.exit_code if self.encoded else 0)

    def __str__(self) -> str:
        if self.encoded is None:
            return f"{self.left}; nothing to repair"
        lines = (
            [*self.found.problems, f"made again: {', '.join(self.found.bad_shards) or 'index'}"] if self.found else []
        )
        return "\n".join([*lines, str(self.encoded), f"after the repair: {self.left}"])


def repair(
    folder: str | Path, overrides: Sequence[str] = (), *, num_workers: int | None = None, progress: bool = True
) -> RepairReport:
    """Verify a dataset, encode the bad shards by the recipe in its manifest, and verify those. Safe to kill and repeat.

    The records in FOLDER/parts say which items are in which shard; where they are gone, everything is made again. Tars
    that do not belong to the dataset are reported and kept.

    Args:
        folder: The dataset.
        overrides: Changes to the recipe, e.g. source.path=... where the source has moved.
        num_workers: Number of processes that verify; None as in `verify`.
        progress: Show progress on stderr.

    Raises:
        InputError: The dataset was made by merge or split, or `encode` refuses the recipe.
    """
    folder = Path(folder)
    saved = folder / PARTS_FOLDER / _RECIPE_NAME
    if saved.exists() and not (folder / MANIFEST_NAME).exists():
        encoded = encode(_load_recipe(folder, saved, overrides), progress=progress)
        return _finished(saved, RepairReport(None, encoded, verify(folder, num_workers=num_workers, progress=progress)))
    manifest = read_manifest(folder)
    recipe = _read_recipe(folder, manifest, saved, overrides)
    found = verify(folder, num_workers=num_workers, progress=progress)
    if not found.num_problems:
        return _finished(saved, RepairReport(found, None, found))
    check_source_in_place(recipe)  # before any shard is marked as missing
    encoded = encode(recipe, again=found.bad_shards, progress=progress)
    # A part is made again as a whole: with several groups it has several shards.
    parts = {part_of(name) for name in found.bad_shards}
    names = [shard.name for shard in read_manifest(folder).shards if part_of(shard.name) in parts]
    left = verify(folder, num_workers=num_workers, progress=progress, only=names)
    return _finished(saved, RepairReport(found, encoded, left))


def _read_recipe(folder: Path, manifest: Manifest, saved: Path, overrides: Sequence[str]) -> EncodeRecipe:
    if manifest.is_derived:
        sets = ", ".join(one["path"] for one in manifest.recipe["of"])
        raise InputError(
            f"dataset {folder}: was made by `pomscale data {manifest.recipe['kind']}`, so it has no source to encode "
            f"again; repair {sets} and do it again"
        )
    make_folder(saved.parent)
    write_text(saved, dump_yaml(manifest.recipe))
    return _load_recipe(folder, saved, overrides)


def _load_recipe(folder: Path, saved: Path, overrides: Sequence[str]) -> EncodeRecipe:
    """Return the saved recipe with overrides, for the dataset's present path; save it with them."""
    recipe = load_encode_recipe(saved, [f"output={json.dumps(str(folder), ensure_ascii=False)}", *overrides])
    if Path(recipe.output) != folder:
        raise InputError(f"override output={recipe.output}: a repair mends {folder} where it is")
    write_text(saved, dump_yaml(recipe.model_dump(mode="json")))
    return recipe


def _finished(saved: Path, report: RepairReport) -> RepairReport:
    saved.unlink(missing_ok=True)
    return report
