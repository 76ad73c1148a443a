"""Find out what a user has named as SOURCE or REFERENCE, pictures or clips, and open it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from pomscale.base.errors import InputError
from pomscale.checkpoint.store import find_checkpoint
from pomscale.config.model import VideoModelConfig
from pomscale.evaluation.generated.clip_files import ClipFiles, ClipReading
from pomscale.evaluation.generated.generated_clips import DEFAULT_NUM_CLIPS, Generated, GeneratedClips
from pomscale.evaluation.generated.generated_pictures import PicturesOfClasses, PicturesOfTexts
from pomscale.evaluation.generated.media_files import (
    Files,
    FolderFiles,
    clip_folder_files,
    kind_of_folder,
    kind_of_tars,
    tar_files,
    tars_of_folder,
)
from pomscale.evaluation.generated.metric_choice import Reference
from pomscale.evaluation.generated.npz_pictures import PIXELS, NpzPictures, array_names
from pomscale.evaluation.generated.picture_files import Fit, PictureFiles
from pomscale.evaluation.generated.picture_sets import Frames, Kind, PictureSet
from pomscale.evaluation.generated.shard_clips import ShardClips
from pomscale.evaluation.generated.shard_pictures import ShardPictures
from pomscale.evaluation.generated.statistics_files import holds_statistics, read_statistics
from pomscale.evaluation.generated.trained_model import Drawing, ModelSource
from pomscale.pretrained.exported import is_exported
from pomscale.pretrained.weights import open_weights
from pomscale.runs.checkpoint_folder import complete_checkpoints
from pomscale.runs.layout import CHECKPOINT_META, CHECKPOINTS_FOLDER, RECIPE_FILE
from pomscale.shards.schema import MANIFEST_NAME, read_manifest
from pomscale.sources.urls import is_url


@dataclass(frozen=True, slots=True)
class Opening:
    """How a set of pictures or clips is opened.

    Attributes:
        num: Number of pictures; None = all, those of `drawing` for a model of pictures, or 2,048 drawn clips.
        fit: The way in which pictures in files are cut and resized; None = they have one size.
        with_captions: Whether captions are needed.
        num_threads: Threads that decode files.
        model: Device and weights of a model; its path is that of the set.
        drawing: The pictures that a model draws.
        frames: The frames of clips that are measured.
        fps: Frames per second to which clips in files are resampled; None = they have one rate.
    """

    num: int | None = None
    fit: Fit | None = None
    with_captions: bool = False
    num_threads: int = 2
    model: ModelSource = field(default_factory=lambda: ModelSource(Path()))
    drawing: Drawing = field(default_factory=Drawing)
    frames: Frames = field(default_factory=Frames)
    fps: float | None = None


def open_pictures(where: str, opening: Opening) -> PictureSet:
    """Open a run, checkpoint or exported folder, an npz file, tars, a dataset of shards, or a folder of files.

    Raises:
        InputError: There is nothing of these at `where`, or it cannot be read.
    """
    if not is_url(where) and where.endswith(".npz"):
        return NpzPictures(Path(where), num=opening.num)
    if where.endswith(".tar"):
        return _of_tars(where, [where], opening)
    if is_url(where) or os.path.isdir(where):
        return _of_folder(where, opening)
    problem = "is no file of these" if os.path.exists(where) else "there is no such file or folder"
    raise InputError(
        f"{where}: {problem}; give a run, a checkpoint, an exported folder, an .npz file, "
        f"tars (NAME.tar, 'NAME-{{000..012}}.tar'), a dataset of shards or a folder of pictures or clips"
    )


def _of_folder(where: str, opening: Opening) -> PictureSet:
    if _is_dataset(where):
        return _of_shards(where, opening)
    if _is_model(where):
        return _generated(Path(where), opening)
    _refuse_runs(where)
    if tars := tars_of_folder(where):
        return _of_tars(where, tars, opening)
    if kind_of_folder(where) == "clips":
        return _of_files(where, clip_folder_files(where, opening.with_captions), "clips", "folder", opening)
    return _of_files(where, FolderFiles(where), "pictures", "folder", opening)


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


def _of_tars(name: str, paths: list[str], opening: Opening) -> PictureFiles | ClipFiles:
    files = tar_files(name, paths, opening.with_captions)
    return _of_files(name, files, kind_of_tars(name, files), "tars", opening)


def _of_files(name: str, files: Files, kind: Kind, form: str, opening: Opening) -> PictureFiles | ClipFiles:
    if kind == "clips":
        reading = ClipReading(opening.frames, opening.fit, opening.fps, opening.num_threads)
        return ClipFiles(name, files, reading, kind=form, num=opening.num)
    return PictureFiles(name, files, kind=form, num=opening.num, fit=opening.fit, num_threads=opening.num_threads)


def _of_shards(where: str, opening: Opening) -> ShardPictures | ShardClips:
    manifest = read_manifest(where)
    device, codec_path = opening.model.device, opening.model.codec_path
    if manifest.modality == "video":
        return ShardClips(where, manifest, opening.frames, num=opening.num, device=device, codec_path=codec_path)
    return ShardPictures(where, num=opening.num, device=device, codec_path=codec_path)


def _generated(path: Path, opening: Opening) -> Generated:
    source = replace(opening.model, path=path)
    model = open_weights(path).card.model
    if isinstance(model, VideoModelConfig):
        drawing = replace(opening.drawing, num=opening.num or DEFAULT_NUM_CLIPS)
        return GeneratedClips(source, drawing, opening.frames)
    drawing = opening.drawing if opening.num is None else replace(opening.drawing, num=opening.num)
    return PicturesOfClasses(source, drawing) if model.text_dim is None else PicturesOfTexts(source, drawing)


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
