"""Raw pictures, clips and captions -> shards.

Items are dealt to fixed parts; a part becomes one shard per latent shape and is a pure function of (source
fingerprint, part number, recipe). So an encode that was killed goes on where it stopped, any number of tasks work on
one output, and it ends with the same bytes as one task that was never disturbed (with a network: on the same device,
with the same batch).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data_pipelines.common.finish import finish
from data_pipelines.common.items import ItemTable, share_table
from data_pipelines.common.job import EncodeJob, Encoders, table_folder, variants_of
from data_pipelines.common.parts import PARTS_FOLDER, Claims
from data_pipelines.common.pipeline import Pipeline
from data_pipelines.common.progress import EncodeProgress
from data_pipelines.common.source import Source, SourceChangedError
from data_pipelines.common.tasks import Task
from data_pipelines.sources import build_source
from pomscale.config.schema import EncodeRecipe, MonitoringConfig
from pomscale.data.schema import FAILURES_NAME, MANIFEST_NAME, Manifest
from pomscale.errors import InputError
from pomscale.files import make_folder
from pomscale.monitoring.monitor import Monitor, open_monitor

# Items that are looked for before an encode begins.
_MAX_TRIED = 16


@dataclass(frozen=True)
class Encoded:
    """One finished dataset."""

    output: Path
    num_samples: int
    num_failures: int
    num_shards: int
    num_bytes: int

    def __str__(self) -> str:
        text = (
            f"{self.output}: {self.num_samples:,} samples in {self.num_shards:,} shards, {self.num_bytes / 1e9:.3f} GB"
        )
        if self.num_failures:
            text += f"; {self.num_failures:,} items failed, listed in {self.output / FAILURES_NAME}"
        return text


@dataclass(frozen=True)
class EncodeReport:
    """What one task did. `datasets` is empty while other tasks are still at work: the last one finishes them."""

    datasets: tuple[Encoded, ...]
    num_parts: int
    num_made: int  # parts made by this task
    num_resumed: int  # parts that were there when it came to them
    num_elsewhere: int  # parts that other tasks are at work on
    stopped: bool
    busy_share: float
    items_per_s: float

    @property
    def exit_code(self) -> int:
        if self.stopped:
            return 75
        return 3 if any(dataset.num_failures for dataset in self.datasets) else 0

    def __str__(self) -> str:
        parts = f"{self.num_made:,} of {self.num_parts:,} parts made"
        if self.num_resumed:
            parts += f", {self.num_resumed:,} were there"
        if self.num_made:
            parts += f"; {self.items_per_s:,.1f} items/s, encoder busy {self.busy_share:.0%}"
        if self.stopped:
            return f"stopped on request: {parts}; finished parts are kept, run the same command again to go on"
        if self.num_elsewhere:
            parts += f"; other tasks are at work on {self.num_elsewhere:,} parts, the last one will finish the dataset"
        return "\n".join([*map(str, self.datasets), parts])


def encode(
    recipe: EncodeRecipe,
    *,
    task: Task = Task(),  # noqa: B008  frozen
    only_failed: bool = False,
    rescan: bool = False,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> EncodeReport:
    """Encodes what is missing in `recipe.output`; the last of its tasks writes index and manifest.

    Items that cannot be encoded are listed in failures.jsonl and the rest goes on. only_failed: parts that list
    failures are made again. rescan: list the source again, and refuse if it changed. InputError for a wrong source or
    an output of another encode; PomscaleError if nothing could be encoded, the disk is full or storage fails.
    """
    # Before anything is written, and before a long listing of the source.
    encoders = Encoders(recipe)
    variants_of(recipe, encoders)
    make_folder(table_folder(recipe))
    with Claims(table_folder(recipe)) as claims:
        with claims.setup():
            job = _open_job(recipe, encoders, rescan)
        with (
            _monitor(recipe, task, len(job.table)) as monitor,
            EncodeProgress(len(job.table), progress, monitor) as display,
        ):
            if job.unrecorded(range(job.num_parts)):
                _check_in_place(recipe, job.source, job.table)
            chosen = _Chosen(job, claims, task, only_failed, display)
            Pipeline(job, display, stop).run(chosen, chosen.finished)
        datasets: tuple[Encoded, ...] = ()
        num_elsewhere = len(job.unrecorded(range(job.num_parts)))
        if not stop() and not num_elsewhere:
            with claims.finishing():
                datasets = _finish(job, rewrite=task.count == 1 or chosen.num_made > 0)
    return EncodeReport(
        datasets=datasets,
        num_parts=job.num_parts,
        num_made=chosen.num_made,
        num_resumed=chosen.num_resumed,
        num_elsewhere=num_elsewhere,
        stopped=stop(),
        busy_share=display.busy_share,
        items_per_s=display.items_per_s,
    )


def check_source(recipe: EncodeRecipe) -> None:
    """InputError if the items that were listed are no longer where the recipe says.

    To the encoder an item that is gone is a failure: a source that has moved would make failures of them all.
    """
    table = ItemTable.open(table_folder(recipe))
    if table is not None:  # else it will be listed, and told then
        _check_in_place(recipe, build_source(recipe.source), table)


def _check_in_place(recipe: EncodeRecipe, source: Source, table: ItemTable) -> None:
    if recipe.codec is None:  # captions are in the list; no item is opened
        return
    usable = (item for item in map(table.__getitem__, range(len(table))) if item.problem is None)
    for item in islice(usable, _MAX_TRIED):
        try:
            source.open(item).close()
        except (FileNotFoundError, SourceChangedError):
            continue
        return
    raise InputError(
        f"source: the items that were listed are not in {recipe.source.path} as they were; "
        f"if it has moved, say where it is: source.path=FOLDER"
    )


def forget_shards(output: Path, shard_names: list[str]) -> None:
    """The parts of these shards count as not done; the shards stay until the next encode replaces them."""
    for name in shard_names:
        part = int(name.removeprefix("shard-").removesuffix(".tar").split("-")[0])
        (output / PARTS_FOLDER / f"part-{part:06d}.json").unlink(missing_ok=True)


def _open_job(recipe: EncodeRecipe, encoders: Encoders, rescan: bool) -> EncodeJob:
    """With the item table, listed by the first task that comes and read by all others."""
    source = build_source(recipe.source)
    folder = table_folder(recipe)
    table = ItemTable.open(folder)
    if table is not None and rescan:
        before = table.fingerprint
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            if ItemTable.build(source, Path(temporary)).fingerprint != before:
                raise InputError(f"source: it is not what it was when {recipe.output} was begun; choose another output")
    if table is None:
        table = ItemTable.build(source, folder)
    job = EncodeJob(recipe, source, table, encoders)
    for variant, store in zip(job.variants, job.stores, strict=True):
        store.adopt(job.plan(variant))
        share_table(folder, store.folder)  # each size is a dataset of its own, to be verified and repaired alone
    return job


class _Chosen:
    """The parts that this task makes, claimed one by one as the pipeline asks for them."""

    def __init__(self, job: EncodeJob, claims: Claims, task: Task, only_failed: bool, display: EncodeProgress) -> None:
        self._job = job
        self._claims = claims
        self._task = task
        self._only_failed = only_failed
        self._display = display
        self.num_made = self.num_resumed = 0

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for part in self._task.order(self._job.num_parts):
            if not self._claims.claim(part):
                self._display.skip(len(self._job.places(part)))
                continue
            missing = self._job.missing(part, self._only_failed)
            if missing:
                self._unfinish(missing)
                yield part, missing
            else:
                self._claims.release(part)
                self.num_resumed += 1
                self._display.skip(len(self._job.places(part)))

    def finished(self, part: int) -> None:
        self.num_made += 1
        self._claims.release(part)

    def _unfinish(self, variants: list[int]) -> None:
        """A folder that has a manifest is complete; these no longer are."""
        for number in variants:
            (self._job.variants[number].output / MANIFEST_NAME).unlink(missing_ok=True)


def _monitor(recipe: EncodeRecipe, task: Task, num_items: int) -> Monitor:
    """Rows go to OUTPUT/parts/task-N/metrics.jsonl, and to wandb if the recipe says so."""
    folder = table_folder(recipe) / f"task-{task.index:05d}"
    make_folder(folder)
    return open_monitor(
        folder,
        MonitoringConfig(wandb=recipe.wandb),
        run_name=f"{recipe.name}-{task.index:05d}",
        recipe_dump=recipe.model_dump(mode="json"),
        total_samples=num_items,
        incarnation=0,
    )


def _finish(job: EncodeJob, rewrite: bool) -> tuple[Encoded, ...]:
    datasets = []
    for variant, store in zip(job.variants, job.stores, strict=True):
        if not rewrite and (variant.output / MANIFEST_NAME).exists():
            continue  # by another task; this one made nothing
        datasets.append(_encoded(variant.output, finish(job, variant, store)))
    return tuple(datasets)


def _encoded(output: Path, manifest: Manifest) -> Encoded:
    return Encoded(
        output=output,
        num_samples=manifest.num_samples,
        num_failures=manifest.num_failures,
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
    )
