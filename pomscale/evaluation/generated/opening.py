"""Find out what a user has named as SOURCE or REFERENCE, and open it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from pomscale.base.errors import InputError
from pomscale.checkpoint.store import find_checkpoint
from pomscale.evaluation.generated.generated_pictures import Drawing, GeneratedPictures, ModelSource
from pomscale.evaluation.generated.metric_choice import Reference
from pomscale.evaluation.generated.npz_pictures import PIXELS, NpzPictures, array_names
from pomscale.evaluation.generated.picture_files import Fit, FolderFiles, PictureFiles, tar_files, tars_of_folder
from pomscale.evaluation.generated.picture_sets import PictureSet
from pomscale.evaluation.generated.shard_pictures import ShardPictures
from pomscale.evaluation.generated.statistics_files import holds_statistics, read_statistics
from pomscale.pretrained.exported import is_exported
from pomscale.runs.checkpoint_folder import complete_checkpoints
from pomscale.runs.layout import CHECKPOINT_META, CHECKPOINTS_FOLDER, RECIPE_FILE
from pomscale.shards.schema import MANIFEST_NAME, read_manifest
from pomscale.sources.urls import is_url


@dataclass(frozen=True, slots=True)
class Opening:
    """How a set of pictures is opened.

    Attributes:
        num: Number of pictures; None = all, or those of `drawing` for a model.
        fit: The way in which pictures in files are cut and resized; None = they have one size.
        with_captions: Whether captions are needed.
        num_threads: Threads that decode files.
        model: Device and weights of a model; its path is that of the set.
        drawing: The pictures that a model draws.
    """

    num: int | None = None
    fit: Fit | None = None
    with_captions: bool = False
    num_threads: int = 2
    model: ModelSource = field(default_factory=lambda: ModelSource(Path()))
    drawing: Drawing = field(default_factory=Drawing)


def open_pictures(where: str, opening: Opening) -> PictureSet:
    """Open a run, checkpoint or exported folder, an npz file, tars, a dataset of shards, or a folder of pictures.

    Raises:
        InputError: There is nothing of these at `where`, or it cannot be read.
    """
    if not is_url(where) and where.endswith(".npz"):
        return NpzPictures(Path(where), num=opening.num)
    if where.endswith(".tar"):
        return _of_tars(where, [where], opening)
    if not is_url(where) and not os.path.isdir(where):
        problem = "is no file of these" if os.path.exists(where) else "there is no such file or folder"
        raise InputError(
            f"{where}: {problem}; give a run, a checkpoint, an exported folder, an .npz file, "
            f"tars (NAME.tar, 'NAME-{{000..012}}.tar'), a dataset of shards or a folder of pictures"
        )
    if _is_dataset(where):
        device, codec_path = opening.model.device, opening.model.codec_path
        return ShardPictures(where, num=opening.num, device=device, codec_path=codec_path)
    if _is_model(where):
        drawing = opening.drawing if opening.num is None else replace(opening.drawing, num=opening.num)
        return GeneratedPictures(replace(opening.model, path=Path(where)), drawing)
    _refuse_runs(where)
    if tars := tars_of_folder(where):
        return _of_tars(where, tars, opening)
    return PictureFiles(
        where,
        FolderFiles(where),
        kind="folder",
        num=opening.num,
        fit=opening.fit,
        num_threads=opening.num_threads,
    )


def open_reference(where: str | None, opening: Opening) -> Reference:
    """Open what `open_pictures` opens, or a file of statistics, which may have pictures beside them."""
    if where is None:
        return Reference()
    path = Path(where)
    if is_url(where) or not path.is_file() or not holds_statistics(path):
        return Reference(pictures=open_pictures(where, opening))
    statistics = read_statistics(path)
    has_pictures = path.suffix == ".npz" and bool(array_names(path) & set(PIXELS))
    return Reference(NpzPictures(path, num=opening.num) if has_pictures else None, statistics)


def _of_tars(name: str, paths: list[str], opening: Opening) -> PictureFiles:
    return PictureFiles(
        name,
        tar_files(paths, opening.with_captions),
        kind="tars",
        num=opening.num,
        fit=opening.fit,
        num_threads=opening.num_threads,
    )


def _is_dataset(where: str) -> bool:
    if not is_url(where):
        return os.path.isfile(os.path.join(where, MANIFEST_NAME))
    try:
        read_manifest(where)
    except InputError:
        return False
    return True


def _is_model(where: str) -> bool:
    folder = Path(where)
    return is_exported(folder) or any(
        (folder / name).exists() for name in (CHECKPOINT_META, CHECKPOINTS_FOLDER, RECIPE_FILE)
    )


def _refuse_runs(where: str) -> None:
    """Raise InputError for a folder of checkpoints or of runs: pictures below it are none that anybody measures."""
    if is_url(where):
        return
    if complete_checkpoints(Path(where)):
        find_checkpoint(Path(where))  # says what it is, and what to give
    if run := next(Path(where).glob(f"*/{RECIPE_FILE}"), None):
        raise InputError(f"{where}: a folder of runs; give one of them, such as {run.parent}")
