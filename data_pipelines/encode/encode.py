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
from pathlib import Path

from data_pipelines.encode.finish import finish
from data_pipelines.encode.items import ItemTable, share_table
from data_pipelines.encode.job import EncodeJob, Encoders, check_in_place, table_folder, variants_of
from data_pipelines.encode.pipeline import Pipeline
from data_pipelines.encode.progress import EncodeProgress
from data_pipelines.encode.skipped import max_skipped_of, skipped_exit_code
from data_pipelines.encode.tasks import Task
from data_pipelines.shards.parts import PARTS_FOLDER, Claims, part_of, record_path
from data_pipelines.sources import build_source
from pomscale.base.console import warn
from pomscale.base.errors import InputError
from pomscale.base.files import make_folder
from pomscale.config.encode import EncodeRecipe
from pomscale.config.monitoring import MonitoringConfig
from pomscale.monitoring.monitor import Monitor, open_monitor
from pomscale.shards.schema import FAILURES_NAME, MANIFEST_NAME, Manifest, read_manifest


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
    num_elsewhere: int  # parts that are not done: other tasks are at work on them, or a stop came
    num_failed: int  # items that this task could not encode
    num_cut: int  # captions that this task cut to max_length tokens
    num_ignored: int  # files of the source that are no items
    stopped: bool
    busy_share: float
    items_per_s: float
    max_skipped: int  # of each dataset, says the recipe

    @property
    def exit_code(self) -> int:
        """A task that leaves the dataset to others is judged by its own items: there is nothing else to judge yet."""
        if self.stopped:
            return 75
        num_skipped = max((dataset.num_failures for dataset in self.datasets), default=self.num_failed)
        return skipped_exit_code(num_skipped, self.max_skipped)

    def __str__(self) -> str:
        parts = f"{self.num_made:,} of {self.num_parts:,} parts made"
        if self.num_resumed:
            parts += f", {self.num_resumed:,} were there"
        if self.num_made:
            parts += f"; {self.items_per_s:,.1f} items/s, encoder busy {self.busy_share:.0%}"
        if self.num_failed:
            parts += f"; {self.num_failed:,} items of them failed"
        if self.num_cut:
            parts += f"; {self.num_cut:,} captions were cut to max_length tokens"
        if self.num_ignored:
            parts += f"; {self.num_ignored:,} files of the source were ignored"
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
    with Claims(table_folder(recipe), several=task.count > 1) as claims:
        with claims.setup():
            job = _open_job(recipe, encoders, rescan)
        with (
            _monitor(recipe, task, len(job.table)) as monitor,
            EncodeProgress(len(job.table), progress, monitor) as display,
        ):
            chosen = _Chosen(job, claims, task, only_failed, display)
            Pipeline(job, display, stop).run(chosen, chosen.finished)
        datasets: tuple[Encoded, ...] = ()
        num_elsewhere = job.num_unrecorded()
        stopped = stop() and num_elsewhere > 0
        if not num_elsewhere:
            with claims.finishing():
                datasets = _finish(job, rewrite=chosen.num_made > 0)
    return EncodeReport(
        datasets=datasets,
        num_parts=job.num_parts,
        num_made=chosen.num_made,
        num_resumed=chosen.num_resumed,
        num_elsewhere=num_elsewhere,
        num_failed=display.num_failed,
        num_cut=display.num_cut,
        num_ignored=job.table.num_ignored,
        stopped=stopped,
        busy_share=display.busy_share,
        items_per_s=display.items_per_s,
        max_skipped=recipe.max_skipped,
    )


def check_source(recipe: EncodeRecipe) -> None:
    """InputError if the items that were listed are no longer where the recipe says."""
    table = ItemTable.open(table_folder(recipe))
    if table is not None:  # else it will be listed, and told then
        check_in_place(recipe, build_source(recipe.source), table)


def forget_shards(output: Path, shard_names: list[str]) -> None:
    """The dataset is no longer complete, nor are the parts of these shards; the shards stay until they are replaced."""
    (output / MANIFEST_NAME).unlink(missing_ok=True)
    for part in {part_of(name) for name in shard_names}:
        record_path(output / PARTS_FOLDER, part).unlink(missing_ok=True)


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
        self._has_checked = False
        self.num_made = self.num_resumed = 0

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for part in self._task.order(self._job.num_parts):
            if not self._claims.claim(part):
                self._display.skip(len(self._job.places(part)))
                continue
            # Failures that last would otherwise be tried again by every task that comes by.
            missing = self._job.missing(part, self._only_failed and self._task.owns(part))
            if missing:
                self._begin(part, missing)
                yield part, missing
            else:
                self._claims.release(part)
                self.num_resumed += 1
                self._display.skip(len(self._job.places(part)))

    def finished(self, part: int) -> None:
        self.num_made += 1
        self._claims.release(part)

    def _begin(self, part: int, variants: list[int]) -> None:
        """Nothing may call the dataset or the part complete while its shards are being replaced."""
        if not self._has_checked:
            check_in_place(self._job.recipe, self._job.source, self._job.table)
            self._has_checked = True
        with self._claims.finishing():
            for number in variants:
                (self._job.variants[number].output / MANIFEST_NAME).unlink(missing_ok=True)
                self._job.stores[number].forget(part)


def _monitor(recipe: EncodeRecipe, task: Task, num_items: int) -> Monitor:
    """Rows go to OUTPUT/parts/task-N/metrics.jsonl, and to wandb if the recipe says so."""
    folder = table_folder(recipe) / f"task-{task.index:05d}"
    make_folder(folder)
    return open_monitor(
        folder,
        MonitoringConfig(wandb=recipe.wandb.model_copy(update={"group": recipe.wandb.group or recipe.name})),
        run_name=f"{recipe.name}-{task.index:05d}",
        recipe_dump=recipe.model_dump(mode="json"),
        total_samples=num_items,
        start=0,
    )


def _finish(job: EncodeJob, rewrite: bool) -> tuple[Encoded, ...]:
    """All datasets; those that have a manifest are written again only if parts of them were made.

    Or if the recipe now puts up with another number of skipped items: verify goes by what the manifest says.
    """
    datasets = []
    for variant, store in zip(job.variants, job.stores, strict=True):
        manifest = _manifest_of(variant.output)
        if manifest is None or rewrite or max_skipped_of(manifest) != job.recipe.max_skipped:
            manifest = finish(job, variant, store)
        datasets.append(_encoded(variant.output, manifest))
    return tuple(datasets)


def _manifest_of(output: Path) -> Manifest | None:
    """None if it is missing, or damaged, which is told: the parts have all that is in it."""
    if not (output / MANIFEST_NAME).exists():
        return None
    try:
        return read_manifest(output)
    except InputError as error:
        warn(f"{error}. It is written again, from the parts")
        return None


def _encoded(output: Path, manifest: Manifest) -> Encoded:
    return Encoded(
        output=output,
        num_samples=manifest.num_samples,
        num_failures=manifest.num_failures,
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
    )
