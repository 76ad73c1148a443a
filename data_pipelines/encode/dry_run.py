"""Describe what an encode would write, with sizes and time from a short sample that is really encoded."""

from __future__ import annotations

import tempfile
from pathlib import Path

from data_pipelines.encode.items import ItemTable
from data_pipelines.encode.part_encoder import PartEncoder
from data_pipelines.encode.progress import EncodeProgress
from data_pipelines.encode.setup import Encoders, EncodeSetup, Variant, find_source, table_folder, variants_of
from pomscale.base.console import format_duration
from pomscale.base.errors import PomscaleError
from pomscale.base.files import make_folder
from pomscale.base.task_index import TaskIndex
from pomscale.config.encode import EncodeRecipe
from pomscale.monitoring.monitor import Monitor

# Enough for the speed to be that of a full pipeline, and short beside any real set.
_SAMPLE_BATCHES = 3


def describe(recipe: EncodeRecipe, *, task: TaskIndex = TaskIndex()) -> str:  # noqa: B008  frozen
    """Return a table for people; no files remain. Raises the errors of `encode` for a wrong source or codec."""
    source = find_source(recipe)
    encoders = Encoders(recipe)
    variants = variants_of(recipe, encoders)
    with tempfile.TemporaryDirectory(prefix="pomscale-dry-run-") as temporary:
        table = ItemTable.open(table_folder(recipe)) or ItemTable.build(source, Path(temporary, "items"), recipe.seed)
        num_sampled = min(len(table), _SAMPLE_BATCHES * recipe.batch)
        changes = {"output": str(Path(temporary, "sample")), "shard_samples": num_sampled}
        sample = EncodeSetup(recipe.model_copy(update=changes), source, table, encoders)
        for store in sample.stores:
            make_folder(store.folder)
        display = EncodeProgress(num_sampled, False, Monitor([]))
        PartEncoder(sample, display).run([(0, list(range(len(variants))))], lambda part: None)
        lines = [_source_line(recipe, table)]
        num_parts = -(-len(table) // recipe.shard_samples)
        for variant, store in zip(variants, sample.stores, strict=True):
            record = store.read(0)
            if record is None or not record.num_samples:
                reason = record.failures[0].reason if record else "nothing was written"
                raise PomscaleError(f"none of the {num_sampled:,} sampled items could be encoded; the first: {reason}")
            per_sample = sum(shard.num_bytes for shard in record.shards) / record.num_samples
            lines.append(
                f"output   {variant.output}: {', '.join(sample.arrays)} ({_shapes(encoders, variant)}), "
                f"{num_parts:,} parts, {per_sample:,.0f} bytes per sample, "
                f"{per_sample * len(table) / 1e9:,.3f} GB in all"
            )
            if record.failures:
                failed, reason = len(record.failures), record.failures[0].reason
                lines.append(f"failed   {failed:,} of {num_sampled:,} sampled items; the first: {reason}")
    if display.has_audio:
        lines.append("sound    of clips is ignored")
    seconds = len(table) / display.items_per_s / task.count
    lines.append(
        f"time     about {format_duration(seconds)} with {task.count:,} task(s) like this one: "
        f"{display.items_per_s:,.1f} items/s, encoder busy {display.busy_share:.0%}"
    )
    return "\n".join(lines)


def _shapes(encoders: Encoders, variant: Variant) -> str:
    if encoders.features is not None:
        *_, height, width = variant.targets[0]
        return f"{encoders.features.grid(*variant.targets[0])} tokens of {encoders.features.dim(height, width)}"
    return " ".join(map(str, variant.latent_shapes)) if encoders.codec else "no latents"


def _source_line(recipe: EncodeRecipe, table: ItemTable) -> str:
    line = f"source   {recipe.source.kind}: {len(table):,} items"
    if table.class_names:
        line += f" in {len(table.class_names):,} classes"
    if table.num_problems:
        line += f", {table.num_problems:,} of them cannot be used"
    if table.num_filtered:
        line += f", {table.num_filtered:,} more left out by source.where"
    if table.num_ignored:
        line += f", {table.num_ignored:,} other files and hidden folders ignored"
    if table.num_captions > 1:
        line += f", up to {table.num_captions} captions of an item"
    return line
