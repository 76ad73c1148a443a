"""Encode raw pictures, clips and captions into shards.

Items are dealt to fixed parts; a part becomes one shard per latent shape and is a pure function of (source
fingerprint, part number, recipe). So an encode that was killed continues where it stopped, any number of tasks work on
one output, and the bytes are those of one task that was never interrupted (with a network: on the same device, with
the same batch).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.encode.expected_size import expected_size
from data_pipelines.encode.finish import finish
from data_pipelines.encode.items import ItemTable, share_table
from data_pipelines.encode.latents_source import build_encode_source
from data_pipelines.encode.part_encoder import PartEncoder
from data_pipelines.encode.progress import EncodeProgress
from data_pipelines.encode.setup import (
    Encoders,
    EncodeSetup,
    check_items_in_place,
    find_source,
    table_folder,
    variants_of,
)
from data_pipelines.shards.parts import OLDER_VERSION, PARTS_FOLDER, part_of, record_path, skipped_exit_code
from pomscale.base.claims import Claims
from pomscale.base.console import say, warn
from pomscale.base.errors import InputError
from pomscale.base.files import make_folder
from pomscale.base.task_index import TaskIndex
from pomscale.config.encode import EncodeRecipe
from pomscale.config.monitoring import MonitoringConfig
from pomscale.monitoring.monitor import Monitor, open_monitor
from pomscale.shards.schema import FAILURES_NAME, MANIFEST_NAME, Manifest, read_manifest
from pomscale.sources.protocol import Source


@dataclass(frozen=True)
class Encoded:
    """One finished dataset."""

    output: Path
    num_samples: int
    num_failures: int
    num_incomplete: int
    num_shards: int
    num_bytes: int

    def __str__(self) -> str:
        text = (
            f"{self.output}: {self.num_samples:,} samples in {self.num_shards:,} shards, {self.num_bytes / 1e9:.3f} GB"
        )
        if self.num_failures:
            text += f"; {self.num_failures:,} items failed, listed in {self.output / FAILURES_NAME}"
        if self.num_incomplete:
            text += f"; {self.num_incomplete:,} clips that end early were kept, marked `incomplete` in their JSON"
        return text


@dataclass(frozen=True)
class EncodeReport:
    """Outcome of one task."""

    datasets: tuple[Encoded, ...]
    """The finished datasets; empty while other tasks are still at work, since the last one finishes them."""
    num_parts: int
    num_made: int
    """Parts that this task made."""
    num_resumed: int
    """Parts that were done when this task came to them."""
    num_elsewhere: int
    """Parts that are not done, because other tasks make them or this task was stopped."""
    num_failed: int
    """Items that this task could not encode."""
    num_cut: int
    """Captions that this task cut to max_length tokens."""
    num_ignored: int
    """Files of the source that are no items, and hidden folders."""
    num_filtered: int
    """Items that `source.where` leaves out."""
    has_audio: bool
    """Whether this task met clips with sound, which is ignored."""
    stopped: bool
    busy_share: float
    items_per_s: float
    max_skipped: int
    """Skipped items per dataset that the recipe allows."""

    @property
    def exit_code(self) -> int:
        """75 after a stop; else 3 or 0, by the failures of the datasets, or of this task while those are unfinished."""
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
        if self.num_filtered:
            parts += f"; {self.num_filtered:,} rows were left out by source.where"
        if self.has_audio:
            parts += "; the sound of clips was ignored"
        if self.num_ignored:
            parts += f"; {self.num_ignored:,} files and hidden folders of the source were ignored"
        if self.stopped:
            return f"stopped on request: {parts}; finished parts are kept, run the same command again to continue"
        if self.num_elsewhere:
            parts += f"; other tasks are at work on {self.num_elsewhere:,} parts, the last one will finish the dataset"
        return "\n".join([*map(str, self.datasets), parts])


def encode(
    recipe: EncodeRecipe,
    *,
    task: TaskIndex = TaskIndex(),  # noqa: B008  frozen
    only_failed: bool = False,
    rescan: bool = False,
    again: Sequence[str] | None = None,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> EncodeReport:
    """Encode what is missing in `recipe.output`; the last of its tasks writes index and manifest.

    Items that cannot be encoded are listed in failures.jsonl, and the others are encoded.

    Args:
        recipe: The encode recipe.
        task: Index of this task among those that share the output.
        only_failed: Make the parts again that list failures.
        rescan: List the source again, and refuse if it has changed.
        again: Names of shards to make again, with their parts, where the output is of this encode; the manifest is
            then written again, too.
        progress: Show progress on stderr.
        stop: Asked between items; once it returns True, the unfinished parts are abandoned.

    Raises:
        InputError: The source is wrong, or the output belongs to another encode.
        PomscaleError: Nothing could be encoded, the disk is full or storage fails.
    """
    # Checked before anything is written, and before a long listing of the source.
    source = find_source(recipe, rescan)
    encoders = Encoders(recipe)
    variants_of(recipe, encoders)
    make_folder(table_folder(recipe))
    with Claims(table_folder(recipe), several=task.count > 1) as claims:
        with claims.listing():
            makes_again = only_failed or again is not None
            setup = _open_setup(recipe, source, encoders, rescan, makes_again)
            if again is not None:
                forget_shards(Path(recipe.output), again)
        for line in expected_size(setup) if progress else ():
            say(line)
        with (
            _monitor(recipe, task, len(setup.table)) as monitor,
            EncodeProgress(len(setup.table), progress, monitor) as display,
        ):
            chosen = _Chosen(setup, claims, task, only_failed, display)
            PartEncoder(setup, display, stop).run(chosen, chosen.finished)
        datasets: tuple[Encoded, ...] = ()
        num_elsewhere = setup.num_unrecorded()
        stopped = stop() and num_elsewhere > 0
        if not num_elsewhere:
            with claims.finishing():
                datasets = _finish(setup, rewrite=chosen.num_made > 0)
    return EncodeReport(
        datasets=datasets,
        num_parts=setup.num_parts,
        num_made=chosen.num_made,
        num_resumed=chosen.num_resumed,
        num_elsewhere=num_elsewhere,
        num_failed=display.num_failed,
        num_cut=display.num_cut,
        num_ignored=setup.table.num_ignored,
        num_filtered=setup.table.num_filtered,
        has_audio=display.has_audio,
        stopped=stopped,
        busy_share=display.busy_share,
        items_per_s=display.items_per_s,
        max_skipped=recipe.max_skipped,
    )


def check_source_in_place(recipe: EncodeRecipe) -> None:
    """Raise InputError if items were listed and are no longer at the path that the recipe names."""
    table = ItemTable.open(table_folder(recipe))
    if table is not None:  # else the encode lists the source, which has errors of its own
        check_items_in_place(recipe, build_encode_source(recipe.source), table)


def forget_shards(output: Path, shard_names: Sequence[str]) -> None:
    """Mark a dataset and the parts of these shards as not complete; the shards stay until they are replaced."""
    (output / MANIFEST_NAME).unlink(missing_ok=True)
    for part in {part_of(name) for name in shard_names}:
        record_path(output / PARTS_FOLDER, part).unlink(missing_ok=True)


def _open_setup(
    recipe: EncodeRecipe, source: Source, encoders: Encoders, rescan: bool, makes_again: bool
) -> EncodeSetup:
    """Return the setup, with the item table that the first task lists and all others read.

    The source is listed again if `rescan` says so, or if an older version listed it and parts are missing or to be made
    again. Raises InputError, with nothing changed, if that gives other items.
    """
    folder = table_folder(recipe)
    table = ItemTable.open(folder)
    if table is None:
        table, rescan = ItemTable.build(source, folder, recipe.seed), False
    setup = EncodeSetup(recipe, source, table, encoders)
    for variant, store in zip(setup.variants, setup.stores, strict=True):
        store.adopt(setup.spec(variant))
        share_table(folder, store.folder)  # each size is a dataset of its own, to be verified and repaired alone
    if rescan or (not table.is_current and (makes_again or setup.num_unrecorded())):
        _check_listing(recipe, source, table)
        table.mark_current(folder)
    return setup


def _check_listing(recipe: EncodeRecipe, source: Source, table: ItemTable) -> None:
    """List the source again; InputError if that gives other items than the table has."""
    with tempfile.TemporaryDirectory(dir=table_folder(recipe)) as temporary:
        if ItemTable.build(source, Path(temporary)).fingerprint != table.fingerprint:
            reason, remedy = f"it is not what it was when {recipe.output} was begun", "choose another output"
            if not table.is_current:
                reason += ", or this version of pomscale lists it in another way (CHANGELOG.md says what has changed)"
                remedy += f", {OLDER_VERSION}"
            raise InputError(f"source: {reason}; {remedy}")


class _Chosen:
    """The parts that this task makes, claimed one by one as the pipeline asks for them."""

    def __init__(
        self, setup: EncodeSetup, claims: Claims, task: TaskIndex, only_failed: bool, display: EncodeProgress
    ) -> None:
        self._setup = setup
        self._claims = claims
        self._task = task
        self._only_failed = only_failed
        self._display = display
        self._has_checked = False
        self.num_made = self.num_resumed = 0

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for part in self._task.order(self._setup.num_parts):
            if not self._claims.claim(part):
                self._display.skip(len(self._setup.positions(part)))
                continue
            # Only by its first task: otherwise every task would try items again that fail each time.
            missing = self._setup.missing(part, self._only_failed and self._task.owns(part))
            if missing:
                self._begin(part, missing)
                yield part, missing
            else:
                self._claims.release(part)
                self.num_resumed += 1
                self._display.skip(len(self._setup.positions(part)))

    def finished(self, part: int) -> None:
        self.num_made += 1
        self._claims.release(part)

    def _begin(self, part: int, variants: list[int]) -> None:
        """Mark the dataset and the part as not complete while the shards are being replaced."""
        if not self._has_checked:
            check_items_in_place(self._setup.recipe, self._setup.source, self._setup.table)
            self._has_checked = True
        with self._claims.finishing():
            for number in variants:
                (self._setup.variants[number].output / MANIFEST_NAME).unlink(missing_ok=True)
                self._setup.stores[number].forget(part)


def _monitor(recipe: EncodeRecipe, task: TaskIndex, num_items: int) -> Monitor:
    """Open the monitor: rows go to OUTPUT/parts/task-N/metrics.jsonl, and to wandb if the recipe says so."""
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


def _finish(setup: EncodeSetup, rewrite: bool) -> tuple[Encoded, ...]:
    """Return all datasets, after writing the manifests that are missing or out of date.

    A manifest is out of date if parts were made, or if the recipe now allows another number of skipped items, which
    `verify` reads from the manifest.
    """
    datasets = []
    for variant, store in zip(setup.variants, setup.stores, strict=True):
        manifest = _manifest_of(variant.output)
        if manifest is None or rewrite or manifest.max_skipped != setup.recipe.max_skipped:
            manifest = finish(setup, variant, store)
        datasets.append(_encoded(variant.output, manifest))
    return tuple(datasets)


def _manifest_of(output: Path) -> Manifest | None:
    """Return the manifest; None if it is missing, or, with a warning, if it is damaged: the parts have all of it."""
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
        num_incomplete=manifest.num_incomplete,
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
    )
