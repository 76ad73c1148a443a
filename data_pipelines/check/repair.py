"""Makes the bad shards of a dataset anew, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.check.verify import VerifyReport, verify
from data_pipelines.derive.derived import is_derived
from data_pipelines.encode.encode import EncodeReport, check_source, encode, forget_shards
from data_pipelines.shards.parts import PARTS_FOLDER, part_of
from pomscale.base.errors import InputError
from pomscale.base.files import make_folder, write_text
from pomscale.config.encode import EncodeRecipe
from pomscale.config.load import load_encode_recipe
from pomscale.config.yaml_file import dump_yaml
from pomscale.shards.schema import MANIFEST_NAME, Manifest, read_manifest

# The recipe of a repair under way. While shards are missing there is no manifest that could tell it.
_RECIPE_NAME = "repair.yaml"


@dataclass(frozen=True)
class RepairReport:
    """`found`: what was wrong (None where an earlier repair was taken up again); `left`: what still is."""

    found: VerifyReport | None
    encoded: EncodeReport | None
    left: VerifyReport

    @property
    def exit_code(self) -> int:
        """As that of an encode: 3 where more items of the source failed than its recipe puts up with."""
        return self.left.exit_code or (self.encoded.exit_code if self.encoded else 0)

    def __str__(self) -> str:
        if self.encoded is None:
            return f"{self.left}; nothing to repair"
        lines = (
            [*self.found.problems, f"made anew: {', '.join(self.found.bad_shards) or 'index'}"] if self.found else []
        )
        return "\n".join([*lines, str(self.encoded), f"after the repair: {self.left}"])


def repair(
    folder: str | Path, overrides: Sequence[str] = (), *, num_workers: int | None = None, progress: bool = True
) -> RepairReport:
    """Verifies, encodes what is bad by the recipe in the manifest, and verifies that. May be killed and run again.

    overrides: changes to that recipe, e.g. where the source lies now. What the encoder noted in FOLDER/parts says
    which items are in which shard; where that is gone, everything is made anew. Tars that are not the dataset's are
    told and left. InputError for a set made by merge or split, or whatever `encode` refuses.
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
    check_source(recipe)  # before anything is forgotten
    forget_shards(folder, found.bad_shards)
    encoded = encode(recipe, progress=progress)
    # A part is made anew as a whole: with several groups it has several shards.
    parts = {part_of(name) for name in found.bad_shards}
    names = [shard.name for shard in read_manifest(folder).shards if part_of(shard.name) in parts]
    left = verify(folder, num_workers=num_workers, progress=progress, only=names)
    return _finished(saved, RepairReport(found, encoded, left))


def _read_recipe(folder: Path, manifest: Manifest, saved: Path, overrides: Sequence[str]) -> EncodeRecipe:
    if is_derived(manifest):
        sets = ", ".join(one["path"] for one in manifest.recipe["of"])
        raise InputError(
            f"dataset {folder}: was made by `pomscale data {manifest.recipe['kind']}`, so it has no source to encode "
            f"again; repair {sets} and do it again"
        )
    make_folder(saved.parent)
    write_text(saved, dump_yaml(manifest.recipe))
    return _load_recipe(folder, saved, overrides)


def _load_recipe(folder: Path, saved: Path, overrides: Sequence[str]) -> EncodeRecipe:
    """The saved recipe, for the place where the dataset is now, with overrides; these are saved as well."""
    recipe = load_encode_recipe(saved, [f"output={json.dumps(str(folder), ensure_ascii=False)}", *overrides])
    if Path(recipe.output) != folder:
        raise InputError(f"override output={recipe.output}: a repair mends {folder} where it is")
    write_text(saved, dump_yaml(recipe.model_dump(mode="json")))
    return recipe


def _finished(saved: Path, report: RepairReport) -> RepairReport:
    saved.unlink(missing_ok=True)
    return report
