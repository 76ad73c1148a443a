"""FlatShard: its boxes, and that any cut of a tensor is saved and loaded as any other."""

from __future__ import annotations

import itertools
import math
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from pomscale.distributed.flat_shard import FlatShard

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def shapes_and_cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int], list[int]]:
    """A shape, and two ways to cut its elements into ranges, some of them empty."""
    shape = draw(SHAPES)
    cuts = [
        [0, *sorted(draw(st.lists(st.integers(0, math.prod(shape)), max_size=3))), math.prod(shape)] for _ in range(2)
    ]
    return shape, cuts[0], cuts[1]


def cut(flat: Tensor, shape: tuple[int, ...], at: list[int]) -> list[FlatShard]:
    return [FlatShard(shape, a, flat[a:b].clone()) for a, b in itertools.pairwise(at)]


@given(shapes_and_cuts())
def test_boxes_tile_the_range(case: tuple[tuple[int, ...], list[int], list[int]]) -> None:
    """Every element of the range is in one box, at its position in the whole, and no box could be left out."""
    shape, at, _ = case
    whole = torch.arange(math.prod(shape))
    for shard in cut(whole, shape, at):
        boxes = shard.boxes()
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        for offsets, sizes, view in boxes:
            there = whole.view(shape)[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
            assert view.equal(there)
        assert torch.cat([view.flatten() for *_, view in boxes] or [whole[:0]]).equal(shard.values)
        for *_, view in boxes:
            view.fill_(-1)
        assert bool((shard.values == -1).all()), "boxes are views"


@settings(max_examples=40)
@given(shapes_and_cuts())
def test_what_one_cut_saves_any_cut_loads(case: tuple[tuple[int, ...], list[int], list[int]]) -> None:
    """All ranks of a save and of a load in one process: the planners and files of torch.distributed.checkpoint."""
    shape, saved_at, loaded_at = case
    whole = torch.rand(math.prod(shape))
    empty = torch.full_like(whole, torch.nan)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), [{"optimizer": {"w": shard}} for shard in cut(whole, shape, saved_at)])
        shards = cut(empty, shape, loaded_at)
        for shard in shards:
            load(Path(folder), {"optimizer": {"w": shard}})
        target = empty.view(shape).clone()
        load(Path(folder), {"optimizer": {"w": target}})
    assert torch.cat([shard.values for shard in shards]).equal(whole)
    assert target.equal(whole.view(shape))


def test_a_whole_tensor_loads_into_a_shard(tmp_path: Path) -> None:
    whole = torch.rand(3, 4)
    save(tmp_path, [{"w": whole}])
    shard = FlatShard((3, 4), 5, torch.zeros(6))
    load(tmp_path, {"w": shard})
    assert shard.values.equal(whole.flatten()[5:11])
    with pytest.raises(CheckpointException, match="Size mismatch"):
        load(tmp_path, {"w": FlatShard((4, 3), 5, torch.zeros(6))})


def test_the_same_range_over_another_buffer() -> None:
    shard = FlatShard((3, 4), 5, torch.zeros(6))
    other = shard.on(torch.ones(6))
    assert (other.start, other.shape) == (shard.start, shard.shape)
    assert shard.values.sum() == 0


def save(folder: Path, states: list[dict[str, object]]) -> None:
    """Save one state per rank as dcp.save does."""
    planners = [DefaultSavePlanner() for _ in states]
    writers = [FileSystemWriter(folder, sync_files=False) for _ in states]
    plans = []
    for rank, (planner, writer, state) in enumerate(zip(planners, writers, states, strict=True)):
        planner.set_up_planner(state, writer.storage_meta(), is_coordinator=rank == 0)
        writer.set_up_storage_writer(is_coordinator=rank == 0)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = [
        writer.write_data(planner.finish_plan(plan), planner).value()
        for planner, writer, plan in zip(planners, writers, plans, strict=True)
    ]
    writers[0].finish(metadata, results)


def load(folder: Path, state: dict[str, object]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=FileSystemReader(folder), planner=DefaultLoadPlanner(), no_dist=True)
