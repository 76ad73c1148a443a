"""Checks before anything is written or submitted. Each raises an InputError that names the remedy."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from launch.record.job import LaunchedAs
from launch.status.runs import summarize
from launch.status.state import LIVE
from pomscale.base.errors import InputError
from pomscale.config.cluster import ClusterProfile, expanded, is_time_limit, minutes_of
from pomscale.config.data import MixtureComponentConfig
from pomscale.config.encode import EncodeRecipe, ImageFolderConfig, VideoFolderConfig
from pomscale.config.identity import differences
from pomscale.config.load import validate
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.train import TrainRecipe, ValidationConfig
from pomscale.config.yaml_file import RecipeSource, read_source
from pomscale.plan.checks import check_layout, check_packing
from pomscale.plan.report import DatasetSize, misfit, plan, summary
from pomscale.runs.checkpoint_folder import complete_checkpoints, samples_of
from pomscale.runs.layout import CHECKPOINT_META, CHECKPOINTS_FOLDER, LAUNCH_FILE, LAUNCHED_RECIPE_FILE, RECIPE_FILE
from pomscale.runs.outcome import is_finished
from pomscale.shards.class_names import check_companion_classes, check_same_classes
from pomscale.shards.location import local_folder
from pomscale.shards.schema import Manifest, check_compatible, check_text, read_manifest


def check_training_data(
    recipe: TrainRecipe, profile: ClusterProfile, to_come: Collection[Path] = ()
) -> DatasetSize | None:
    """Check that the datasets of a recipe exist and fit it. Return their total size; None if one is still to come.

    to_come: folders that jobs before this one will write.
    """
    datasets: list[MixtureComponentConfig | ValidationConfig] = [*recipe.data.components]
    if recipe.validation is not None:
        datasets.append(recipe.validation)
    manifests = [_check_dataset(dataset.path, recipe, profile, to_come) for dataset in datasets]
    if recipe.model.text_dim is not None:
        for dataset, manifest in zip(datasets, manifests, strict=True):
            _check_texts(dataset, manifest, recipe.model, profile, to_come)
    else:
        _check_classes(datasets, manifests)
    if recipe.init_from is not None:
        _check_there("init_from.path", recipe.init_from.path, to_come)
    of_training = manifests[: len(recipe.data.components)]
    known = [manifest for manifest in of_training if manifest is not None]
    if known:
        check_packing(recipe, [group.shape for manifest in known for group in manifest.groups])
    if len(known) < len(of_training):
        return None
    num_bytes = sum(shard.num_bytes for manifest in known for shard in manifest.shards)
    return DatasetSize(sum(manifest.num_samples for manifest in known), num_bytes)


def _check_dataset(
    path: str, recipe: TrainRecipe, profile: ClusterProfile, to_come: Collection[Path]
) -> Manifest | None:
    manifest = _manifest(path, profile, to_come)
    if manifest is not None:
        check_compatible(path, manifest, recipe.codec, recipe.model)
    return manifest


def _check_texts(
    dataset: MixtureComponentConfig | ValidationConfig,
    main: Manifest | None,
    model: ImageModelConfig | VideoModelConfig,
    profile: ClusterProfile,
    to_come: Collection[Path],
) -> None:
    """Check the texts of a dataset, which lie in its own shards or in a companion set."""
    location = dataset.text or dataset.path
    manifest = _manifest(location, profile, to_come)
    if manifest is not None:
        check_text(location, manifest, model)
        if main is not None:
            check_companion_classes(dataset.path, main, location, manifest)


def _check_classes(
    datasets: Sequence[MixtureComponentConfig | ValidationConfig], manifests: Sequence[Manifest | None]
) -> None:
    """Check that all datasets that exist have the classes of the first one."""
    known = [
        (f"dataset {dataset.path}", manifest.class_names)
        for dataset, manifest in zip(datasets, manifests, strict=True)
        if manifest is not None
    ]
    for location, names in known[1:]:
        check_same_classes(location, names, *known[0])


def _manifest(path: str, profile: ClusterProfile, to_come: Collection[Path]) -> Manifest | None:
    """Return the manifest of a dataset; None if a job before this one will write it."""
    folder = local_folder(path)
    if folder is None and profile.offline:
        raise InputError(f"dataset {path}: the nodes of this cluster have no internet; copy it to a disk that they see")
    if folder is not None and _is_to_come(folder, to_come):
        return None
    return read_manifest(path)


def check_source(recipe: EncodeRecipe, to_come: Collection[Path] = ()) -> None:
    """Check that a source that is one folder exists. Other sources are checked when they are listed."""
    if isinstance(recipe.source, ImageFolderConfig | VideoFolderConfig):
        _check_there("source.path", recipe.source.path, to_come)


def _check_there(key: str, path: str, to_come: Collection[Path]) -> None:
    folder = local_folder(path)
    if folder is not None and not folder.exists() and not _is_to_come(folder, to_come):
        raise InputError(f"{key}: {path}: there is no such file or folder")


def _is_to_come(path: Path, to_come: Collection[Path]) -> bool:
    path = path.absolute()
    return any(path.is_relative_to(folder) for folder in to_come)


def check_machine(
    recipe: TrainRecipe, profile: ClusterProfile, num_nodes: int, num_ranks: int, dataset: DatasetSize | None
) -> list[str]:
    """Check that so many ranks can share the recipe's batch, and that it fits their GPUs if the profile names them.

    Returns the lines of the memory plan; none if the GPU is not known.
    """
    check_layout(recipe, num_ranks)
    if profile.gpus_per_node == 0 and recipe.compute.device == "cuda":
        raise InputError("compute.device: cuda, but this cluster profile gives no GPUs (gpus_per_node: 0)")
    if profile.gpu is None or recipe.compute.device == "cpu":
        return []
    gpus_per_node = num_ranks // num_nodes
    made = plan(recipe, num_nodes=num_nodes, gpus_per_node=gpus_per_node, gpu=profile.gpu, dataset=dataset)
    if not made.fits:
        raise InputError(misfit(made))
    return summary(made)


def check_run_folder(job_folder: Path, recipe: TrainRecipe) -> None:
    """Check that the run has not begun, or that it may continue with this recipe and is not finished."""
    then = _recipe_then(job_folder)
    if then is None:
        return
    complete = complete_checkpoints(job_folder / CHECKPOINTS_FOLDER)
    wrong = [f"kind: {then['kind']}"] if then["kind"] != "train" else differences(then, recipe.model_dump(mode="json"))
    if wrong:
        instead = "choose another name" if complete else "choose another name, delete it (there is no checkpoint in it)"
        raise InputError(f"{job_folder}: this run began with another recipe; {instead}, or undo: {'; '.join(wrong)}")
    if complete and recipe.resume == "never":
        raise InputError(
            f"{job_folder}: holds checkpoints, and resume is never; choose another name or delete the folder"
        )
    if has_finished(job_folder, recipe):
        raise InputError(
            f"{job_folder}: finished already, {samples_of(complete[-1]):,} samples; "
            "to continue, raise training.total_samples"
        )


def has_finished(job_folder: Path, recipe: TrainRecipe) -> bool:
    """Whether the run has finished all samples of this recipe."""
    complete = complete_checkpoints(job_folder / CHECKPOINTS_FOLDER)
    is_whole = bool(complete) and _recipe_in(complete[-1]) is not None
    return is_whole and samples_of(complete[-1]) >= recipe.training.total_samples and is_finished(job_folder)


def _recipe_in(checkpoint: Path) -> dict[str, Any] | None:
    """Return the recipe in a checkpoint; None if it is damaged, in which case training sets the checkpoint aside."""
    try:
        recipe: dict[str, Any] = json.loads((checkpoint / CHECKPOINT_META).read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return recipe


def _recipe_then(job_folder: Path) -> Mapping[str, Any] | None:
    """Return the recipe of the run so far: that of its newest checkpoint, else of its newest start or launch."""
    for checkpoint in reversed(complete_checkpoints(job_folder / CHECKPOINTS_FOLDER)):
        if (recipe := _recipe_in(checkpoint)) is not None:
            return recipe
    for name in (RECIPE_FILE, LAUNCHED_RECIPE_FILE):
        if (job_folder / name).is_file():
            return read_source(job_folder / name).values
    return None


def check_encode_folder(job_folder: Path, recipe: EncodeRecipe) -> None:
    """Check that any earlier launch in this job folder was an encode of the same dataset."""
    if not (job_folder / LAUNCHED_RECIPE_FILE).is_file():
        return
    then = read_source(job_folder / LAUNCHED_RECIPE_FILE).values
    if (then["kind"], then.get("output")) != ("encode", recipe.output):
        raise InputError(f"{job_folder}: jobs of another recipe were launched there; choose another name, or delete it")


def launched_profile(job_folder: Path, launched: LaunchedAs) -> ClusterProfile:
    """Return the profile that a job was launched with. InputError if it is that of a version with other rules."""
    path = job_folder / LAUNCH_FILE
    try:
        source = RecipeSource(dict(launched.profile), {(): str(path)})
        return cast(ClusterProfile, validate(source, {"cluster": ClusterProfile}))
    except InputError as error:
        again = shlex.join(launched.command_line)
        raise InputError(
            f"{error}\nthis is the profile of the last launch; launch again, and it goes on: {again}"
        ) from None


def check_not_in_queue(job_folder: Path) -> None:
    """Check that no job waits or runs in this job folder."""
    if not job_folder.is_dir():
        return
    found = summarize({job_folder: job_folder.name})
    state = found.runs[0]
    if state.state in LIVE:
        job = f", job {state.job_id}" if state.job_id else ""
        by_folder = f" (according to its folder; {found.problem})" if found.problem else ""
        shown = shlex.quote(str(job_folder))
        raise InputError(
            f"{job_folder}: {state.state} already{job}{by_folder}; watch it with `pomscale watch {shown}`, "
            f"or end it with `pomscale runs cancel {shown}`"
        )


def check_interpreter(profile: ClusterProfile) -> None:
    """Check the interpreter of a job on this machine. For the nodes of a cluster `pomscale cluster check` does it."""
    if profile.python is not None and shutil.which(expanded(profile.python, "python")) is None:
        raise InputError(
            f"python: {profile.python} is no program on this machine; give the profile (or --set python=) another"
        )


def check_time_limit(profile: ClusterProfile, time_limit: str | None) -> None:
    """Check that a time limit has SLURM's form, and that it is longer than the time of the signal before it."""
    if time_limit is None:
        return
    if not is_time_limit(time_limit):
        raise InputError(f"--time {time_limit}: give HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES")
    if profile.scheduler == "slurm" and minutes_of(time_limit) * 60 <= profile.signal_lead_s:
        raise InputError(
            f"--time {time_limit}: not longer than the profile's signal_lead_s, {profile.signal_lead_s} s, so the job "
            "would stop as soon as it starts"
        )
