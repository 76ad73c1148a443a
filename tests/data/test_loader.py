from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic_dataset import write_dataset

from pomscale.data.dataset import LatentDataset
from pomscale.data.loader import Loader, MicroBatch, micro_batch_positions, num_micro_batches
from pomscale.data.order import SampleOrder
from pomscale.errors import InputError

SHARD_SIZES = [10, 17, 10]
NUM_RECORDS = sum(SHARD_SIZES)
WINDOW = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, SHARD_SIZES)
    return LatentDataset.open(folder, "codec")


def open_loader(dataset: LatentDataset, **changes: object) -> Loader[MicroBatch]:
    options = {
        "seed": 0,
        "shuffle_window": WINDOW,
        "global_batch": 6,
        "micro_batch": None,
        "rank": 0,
        "world_size": 1,
        "start_position": 0,
        "flip_probability": 0.5,
        "num_threads": 2,
        "prefetch": 3,
        "finish": lambda batch: batch,
        "pin_memory": False,
    }
    return Loader(dataset, **(options | changes))  # type: ignore[arg-type]


def records_of(batch: MicroBatch) -> list[int]:
    """The synthetic latents of record r are r everywhere."""
    return batch.latents[:, 0, 0, 0].long().tolist()


Leg = tuple[int, int | None, int, int]  # ranks, micro-batch, threads, steps


def legs(max_threads: int) -> st.SearchStrategy[list[Leg]]:
    leg = st.tuples(st.integers(1, 8), st.none() | st.integers(1, 9), st.integers(0, max_threads), st.integers(1, 5))
    return st.lists(leg, min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(global_batch=st.integers(8, 30), schedule=legs(0))
def test_any_layout_covers_every_position_once(global_batch: int, schedule: list[Leg]) -> None:
    start = 0
    seen: list[int] = []
    for world_size, micro_batch, _, num_steps in schedule:
        num_pieces = num_micro_batches(global_batch, world_size, micro_batch)
        for rank in range(world_size):
            pieces = micro_batch_positions(
                start, global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=world_size
            )
            for i, (positions, weights) in enumerate(itertools.islice(pieces, num_steps * num_pieces)):
                step_start = start + i // num_pieces * global_batch
                assert 1 <= len(positions) <= (micro_batch or global_batch)
                # Padding, too, stays inside the step that is being trained on.
                assert ((step_start <= positions) & (positions < step_start + global_batch)).all()
                seen += positions[weights == 1].tolist()
        start += num_steps * global_batch
    assert sorted(seen) == list(range(start))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(global_batch=st.integers(8, 30), schedule=legs(4))
def test_no_sample_is_lost_or_doubled_when_the_layout_changes(
    dataset: LatentDataset, global_batch: int, schedule: list[Leg]
) -> None:
    start = 0
    seen: dict[int, int] = {}
    for world_size, micro_batch, num_threads, num_steps in schedule:
        loaders = [
            open_loader(
                dataset,
                global_batch=global_batch,
                micro_batch=micro_batch,
                rank=rank,
                world_size=world_size,
                num_threads=num_threads,
                start_position=start,
            )
            for rank in range(world_size)
        ]
        for loader in loaders:
            for batch in itertools.islice(loader, num_steps * loader.num_micro_batches):
                kept = batch.weights == 1
                new = dict(
                    zip(batch.positions[kept].tolist(), batch.latents[kept, 0, 0, 0].int().tolist(), strict=True)
                )
                assert new.keys().isdisjoint(seen)
                seen |= new
        close_all(loaders)
        start += num_steps * global_batch
    assert sorted(seen) == list(range(start))
    in_order = [seen[position] for position in range(start)]
    assert in_order == SampleOrder(SHARD_SIZES, 0, WINDOW).records(np.arange(start)).tolist()
    for epoch in range(start // NUM_RECORDS):
        assert sorted(in_order[epoch * NUM_RECORDS : (epoch + 1) * NUM_RECORDS]) == list(range(NUM_RECORDS))


def close_all(loaders: list[Loader[MicroBatch]]) -> None:
    """At once, since each waits up to a tenth of a second for its threads."""
    threads = [threading.Thread(target=loader.close) for loader in loaders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_batch_has_the_promised_shapes(dataset: LatentDataset) -> None:
    with open_loader(dataset, global_batch=7, micro_batch=4) as loader:
        assert loader.num_micro_batches == 2
        first, second = itertools.islice(loader, 2)
    assert [len(batch.positions) for batch in (first, second)] == [3, 4]
    assert first.latents.shape == (3, 4, 2, 3)
    assert first.latents.dtype == first.weights.dtype == torch.float32
    assert first.condition.dtype == first.positions.dtype == torch.int64
    assert first.condition.tolist() == [record % 5 for record in records_of(first)]


def test_every_rank_has_the_same_number_of_micro_batches(dataset: LatentDataset) -> None:
    weights = []
    for rank in range(2):
        with open_loader(dataset, global_batch=5, micro_batch=1, rank=rank, world_size=2) as loader:
            assert loader.num_micro_batches == 3
            weights.append([batch.weights.tolist() for batch in itertools.islice(loader, 3)])
    assert weights == [[[0.0], [1.0], [1.0]], [[1.0], [1.0], [1.0]]]


def test_finish_runs_in_the_reader_threads(dataset: LatentDataset) -> None:
    def finish(batch: MicroBatch) -> tuple[str, torch.Tensor]:
        return threading.current_thread().name, batch.positions

    with open_loader(dataset, finish=finish) as loader:
        name, positions = next(loader)  # type: ignore[misc]
    assert name != threading.main_thread().name
    assert positions.tolist() == list(range(6))


def test_impossible_layouts_are_refused(dataset: LatentDataset) -> None:
    with pytest.raises(InputError, match="cannot be shared by 7 ranks"):
        open_loader(dataset, world_size=7)
    with pytest.raises(InputError, match=r"seen 8 samples.*global_batch 6"):
        open_loader(dataset, start_position=8)


def test_starting_far_into_training_costs_nothing(dataset: LatentDataset) -> None:
    start = 6 * 10**12
    with open_loader(dataset, start_position=start) as loader:
        assert next(loader).positions.tolist() == list(range(start, start + 6))


@pytest.fixture
def no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, f"still running: {set(threading.enumerate()) - before}"
        time.sleep(0.01)


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_close_ends_the_threads(dataset: LatentDataset, num_threads: int, no_leaked_threads: None) -> None:
    loader = open_loader(dataset, num_threads=num_threads)
    next(loader)
    loader.close()
    loader.close()
    assert list(loader) == []
    open_loader(dataset, num_threads=num_threads).close()  # never read


@pytest.mark.parametrize("num_threads", [0, 2])
def test_damage_met_by_a_thread_reaches_the_trainer(tmp_path: Path, num_threads: int, no_leaked_threads: None) -> None:
    write_dataset(tmp_path, SHARD_SIZES)
    shard = tmp_path / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with open_loader(LatentDataset.open(tmp_path, "codec"), num_threads=num_threads) as loader:
        with pytest.raises(InputError, match=r"^\S*shard-000001\.tar: has ") as caught:
            list(itertools.islice(loader, 10))
        assert "Traceback" not in str(caught.value)
        assert list(loader) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs CUDA")
def test_batches_are_pinned(dataset: LatentDataset) -> None:
    with open_loader(dataset, finish=lambda batch: (batch.latents, batch.positions), pin_memory=True) as loader:
        assert all(tensor.is_pinned() for tensor in next(loader))


def test_a_bug_in_finish_keeps_its_traceback(dataset: LatentDataset) -> None:
    def finish(batch: MicroBatch) -> None:
        raise ZeroDivisionError("a bug")

    with (
        open_loader(dataset, finish=finish) as loader,
        pytest.raises(ZeroDivisionError, match=r"(?s)test_loader\.py.*a bug"),
    ):
        next(loader)
