from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pomscale.base.errors import InputError
from pomscale.config.data import CacheConfig
from pomscale.data.dataset import LatentDataset
from pomscale.data.loader import Loader, MicroBatch, ReadAhead, micro_batch_positions, num_micro_batches
from pomscale.data.mixture import Mixture
from pomscale.data.order import SampleOrder
from pomscale.data.readers import shard_files
from pomscale.data.remote.fetch import DatasetFile, fetch
from pomscale.shards.schema import Normalization
from support.damage import flip_bit
from support.running import wait_until
from support.synthetic_dataset import LATENT_SHAPE, write_dataset

SHARD_SIZES = [10, 17, 10]
NUM_RECORDS = sum(SHARD_SIZES)
WINDOW = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, SHARD_SIZES)
    return LatentDataset.open(folder, "codec")


def mix(*datasets: LatentDataset, weights: list[float] | None = None, global_batch: int = 6) -> Mixture:
    return Mixture(
        datasets,
        weights or [1.0] * len(datasets),
        seed=0,
        global_batch=global_batch,
        shuffle_window=WINDOW,
        flip_probability=0.5,
    )


def open_loader(
    mixture: Mixture, num_threads: int = 2, prefetch: int = 3, pin_memory: bool = False, **changes: object
) -> Loader[MicroBatch]:
    options = {"micro_batch": None, "rank": 0, "world_size": 1, "start_position": 0, "finish": lambda batch: batch}
    ahead = ReadAhead(num_threads, prefetch, pin_memory)
    return Loader(mixture, ahead=ahead, **(options | changes))  # type: ignore[arg-type]


def records_of(batch: MicroBatch) -> list[int]:
    """The synthetic latents of record r are r everywhere."""
    return batch.latents.flatten(1)[:, 0].long().tolist()


def test_the_reader_threads_leave_the_number_of_torch_s_threads_alone(dataset: LatentDataset) -> None:
    """torchdata sets it to 1 in each of them. The thread that trains is one that has not computed before."""
    before = torch.get_num_threads()

    def train() -> int:
        torch.set_num_threads(3)
        with open_loader(mix(dataset)) as loader:
            next(loader)
        return torch.get_num_threads()

    try:
        with ThreadPoolExecutor(1) as new_thread:
            assert new_thread.submit(train).result() == 3
    finally:
        torch.set_num_threads(before)


Leg = tuple[int, int | None, int, int]  # ranks, micro-batch, threads, steps


def legs(max_threads: int) -> st.SearchStrategy[list[Leg]]:
    leg = st.tuples(st.integers(1, 8), st.none() | st.integers(1, 9), st.integers(0, max_threads), st.integers(1, 5))
    return st.lists(leg, min_size=1, max_size=4)


@settings(max_examples=200)
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


@dataclass(frozen=True)
class Data:
    """What is trained on. Records are told apart by their values: dataset d has those from 1000 d on."""

    datasets: list[LatentDataset]
    weights: list[float]
    components: list[set[int]]  # the records that have one shape in one dataset

    def mixture(self, global_batch: int) -> Mixture:
        return mix(*self.datasets, weights=self.weights, global_batch=global_batch)


CLIP = (4, 2, 2, 2)


@pytest.fixture(scope="module")
def all_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Data]:
    root = tmp_path_factory.mktemp("all")
    write_dataset(root / "a", SHARD_SIZES)
    write_dataset(root / "b", [6, 9, 4, 8], shapes=[LATENT_SHAPE, (4, 3, 2)], shard_groups=[0, 0, 1, 1])
    write_dataset(root / "c", [6, 9, 4, 3], shapes=[CLIP, LATENT_SHAPE], shard_groups=[0, 0, 0, 1], first_record=1000)
    write_dataset(root / "d", [5, 2], first_record=2000)
    a, b, c, d = (LatentDataset.open(root / name, "codec") for name in "abcd")
    in_b = [set(range(15)), set(range(15, 27))]
    in_c = [set(range(1000, 1019)), set(range(1019, 1022))]
    return {
        "one shape": Data([a], [1.0], [set(range(NUM_RECORDS))]),
        "buckets": Data([b], [1.0], in_b),
        "mixture": Data([b, c, d], [3.0, 1.5, 0.5], [*in_b, *in_c, set(range(2000, 2007))]),
    }


@pytest.fixture(scope="module")
def ranks() -> Iterator[ThreadPoolExecutor]:
    """Threads to read in, and to close loaders in while the test goes on: starting and stopping them is waiting."""
    with ThreadPoolExecutor(64) as pool:
        yield pool


@pytest.mark.parametrize("kind", ["one shape", "buckets", "mixture"])
@pytest.mark.parametrize("num_schedules", [16, pytest.param(67, marks=pytest.mark.exhaustive)])
def test_no_sample_is_lost_or_doubled_when_the_layout_changes(
    all_data: dict[str, Data], ranks: ThreadPoolExecutor, kind: str, num_schedules: int
) -> None:
    """In 48, or 200, schedules: the order that one process alone would read, and in it every epoch whole."""

    @settings(max_examples=num_schedules)
    @given(global_batch=st.integers(8, 30), schedule=legs(4))
    def check(global_batch: int, schedule: list[Leg]) -> None:
        check_schedule(all_data[kind], ranks, global_batch, schedule)

    check()


def check_schedule(data: Data, ranks: ThreadPoolExecutor, global_batch: int, schedule: list[Leg]) -> None:
    start = 0
    seen: dict[int, int] = {}
    shapes: dict[int, set[torch.Size]] = defaultdict(set)
    for world_size, micro_batch, num_threads, num_steps in schedule:
        loaders = [
            open_loader(
                data.mixture(global_batch),
                micro_batch=micro_batch,
                rank=rank,
                world_size=world_size,
                num_threads=num_threads,
                start_position=start,
            )
            for rank in range(world_size)
        ]
        leg = [itertools.islice(loader, num_steps * loader.num_micro_batches) for loader in loaders]
        for batch in itertools.chain.from_iterable(ranks.map(list, leg)):
            kept = batch.weights == 1
            new = {p: r for p, r, k in zip(batch.positions.tolist(), records_of(batch), kept, strict=True) if k}
            assert new.keys().isdisjoint(seen)
            seen |= new
            shapes[int(batch.positions[0]) // global_batch].add(batch.latents.shape[1:])
        for loader in loaders:
            ranks.submit(loader.close)
        start += num_steps * global_batch
    assert sorted(seen) == list(range(start))
    assert all(len(of_step) == 1 for of_step in shapes.values())

    alone = data.mixture(global_batch)
    steps = (alone.read(np.arange(step, step + global_batch)) for step in range(0, start, global_batch))
    in_order = [int(record) for samples in steps for record in samples.latents.flatten(1)[:, 0]]
    assert [seen[position] for position in range(start)] == in_order
    for records in data.components:
        of_component = [record for record in in_order if record in records]
        for epoch in range(0, len(of_component), len(records)):
            block = of_component[epoch : epoch + len(records)]
            assert len(set(block)) == len(block)
    for dataset, epochs in zip(data.datasets, alone.epochs(start).values(), strict=True):
        first = dataset.read(np.arange(1), np.arange(1), seed=0, flip_probability=0).latents.flatten()[0]
        of_dataset = [record for record in in_order if first <= record < first + len(dataset)]
        assert epochs.mean == pytest.approx(len(of_dataset) / len(dataset))


def test_one_dataset_of_one_shape_is_read_in_the_order_of_its_records(dataset: LatentDataset) -> None:
    with open_loader(mix(dataset)) as loader:
        seen = [record for batch in itertools.islice(loader, 20) for record in records_of(batch)]
    assert seen == SampleOrder(SHARD_SIZES, 0, WINDOW).records(np.arange(120)).tolist()


@pytest.mark.parametrize("reading", ["streamed", "cached"])
def test_where_shards_are_read_from_changes_nothing(tmp_path: Path, reading: str) -> None:
    manifest = write_dataset(tmp_path / "data", SHARD_SIZES, text=True)
    normalization = Normalization.of(manifest, "codec")
    folder = str(tmp_path / "data")
    ways: list[dict[str, Any]] = [
        {},
        {"reading": "streamed"} if reading == "streamed" else {"cache": CacheConfig(path=str(tmp_path / "cache"))},
    ]
    seen = []
    for way in ways:
        mixture = mix(LatentDataset(folder, manifest, normalization, text=folder, **way))
        with open_loader(mixture, start_position=600) as loader:
            batches = list(itertools.islice(loader, 20))
        mixture.close()
        seen.append([(batch.latents.tolist(), batch.text.tolist(), batch.positions.tolist()) for batch in batches])
    assert seen[0] == seen[1]


def test_a_batch_has_the_promised_shapes(dataset: LatentDataset) -> None:
    with open_loader(mix(dataset, global_batch=7), micro_batch=4) as loader:
        assert loader.num_micro_batches == 2
        first, second = itertools.islice(loader, 2)
    assert [len(batch.positions) for batch in (first, second)] == [3, 4]
    assert first.latents.shape == (3, 4, 2, 3)
    assert (first.latents.dtype, first.weights.dtype) == (torch.float16, torch.float32)
    assert first.condition.dtype == first.positions.dtype == torch.int64
    assert first.condition.tolist() == [record % 5 for record in records_of(first)]


def test_every_rank_has_the_same_number_of_micro_batches(dataset: LatentDataset) -> None:
    weights = []
    for rank in range(2):
        with open_loader(mix(dataset, global_batch=5), micro_batch=1, rank=rank, world_size=2) as loader:
            assert loader.num_micro_batches == 3
            weights.append([batch.weights.tolist() for batch in itertools.islice(loader, 3)])
    assert weights == [[[0.0], [1.0], [1.0]], [[1.0], [1.0], [1.0]]]


def test_finish_runs_in_the_reader_threads(dataset: LatentDataset) -> None:
    def finish(batch: MicroBatch) -> tuple[str, torch.Tensor]:
        return threading.current_thread().name, batch.positions

    with open_loader(mix(dataset), finish=finish) as loader:
        name, positions = next(loader)  # type: ignore[misc]
    assert name != threading.main_thread().name
    assert positions.tolist() == list(range(6))


def test_impossible_layouts_are_refused(dataset: LatentDataset) -> None:
    with pytest.raises(InputError, match="cannot be shared by 7 ranks"):
        open_loader(mix(dataset), world_size=7)
    with pytest.raises(InputError, match=r"seen 8 samples.*global_batch 6"):
        open_loader(mix(dataset), start_position=8)


def test_starting_far_into_training_costs_nothing(dataset: LatentDataset) -> None:
    start = 6 * 10**12
    with open_loader(mix(dataset), start_position=start) as loader:
        assert next(loader).positions.tolist() == list(range(start, start + 6))


def test_starting_far_into_training_on_a_mixture_costs_nothing(all_data: dict[str, Data]) -> None:
    start = 6 * 10**12
    mixture = all_data["mixture"].mixture(6)
    with open_loader(mixture, start_position=start) as loader:
        assert next(loader).positions.tolist() == list(range(start, start + 6))
    shares = [start * share / len(d) for share, d in zip(mixture.shares, mixture.datasets, strict=True)]
    assert [epochs.mean for epochs in mixture.epochs(start).values()] == pytest.approx(shares)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_bad_samples_keep_their_positions_with_weight_0(tmp_path: Path, num_threads: int) -> None:
    manifest = write_dataset(tmp_path, SHARD_SIZES, text=True)
    flip_bit(tmp_path, 3)
    flip_bit(tmp_path, 30, array="text")
    normalization = Normalization.of(manifest, "codec")
    skipping = LatentDataset(tmp_path, manifest, normalization, text=str(tmp_path), bad_samples="skip")
    met: list[int] = []
    # 5 samples on 3 ranks in micro-batches of 1: rank 0 has one piece of padding, which repeats a sample.
    for rank in range(3):
        layout = {"micro_batch": 1, "rank": rank, "world_size": 3, "num_threads": num_threads}
        with open_loader(mix(skipping, global_batch=5), **layout) as loader:
            for batch in itertools.islice(loader, 2 * 8):  # one epoch, and three samples of the next
                is_bad = [sample.record for sample in batch.bad]
                met += is_bad
                (weight,), (value,), (length,) = batch.weights.tolist(), records_of(batch), batch.text_lengths.tolist()
                if is_bad:
                    assert (weight, value, length) == (0, 0, 1)
                    assert (batch.text == -1).all()
    order = SampleOrder(SHARD_SIZES, 0, WINDOW).records(np.arange(40)).tolist()
    assert sorted(met) == sorted(record for record in order if record in (3, 30))


@pytest.mark.parametrize(("num_threads", "prefetch"), [(1, 1), (2, 2), (3, 12)])
def test_no_more_is_read_ahead_than_was_asked_for(dataset: LatentDataset, num_threads: int, prefetch: int) -> None:
    read: list[int] = []

    def finish(batch: MicroBatch) -> MicroBatch:
        read.append(int(batch.positions[0]))
        return batch

    with open_loader(mix(dataset), num_threads=num_threads, prefetch=prefetch, finish=finish) as loader:
        next(loader)
        wait_until(lambda: len(read) > prefetch, timeout_s=60)  # a thread may not get to it for a while
        at_rest = -1
        while len(read) != at_rest:
            at_rest = len(read)
            time.sleep(0.3)
    at_once = min(4, prefetch)
    assert prefetch <= at_rest - 1 <= prefetch + (num_threads + 1) * at_once


def test_shards_that_are_still_needed_are_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that read other steps at the same time, each with other windows ahead of it."""
    num_shards, window = 48, 64
    manifest = write_dataset(tmp_path, [16] * num_shards)
    fetched: list[str] = []

    def counted(file: DatasetFile, *arguments: Any, **options: Any) -> None:
        fetched.append(file.name)
        fetch(file, *arguments, **options)

    monkeypatch.setattr(shard_files, "fetch", counted)
    streamed = LatentDataset(tmp_path, manifest, Normalization.of(manifest, "codec"), reading="streamed")
    mixture = Mixture([streamed], [1.0], seed=0, global_batch=16, shuffle_window=window, flip_probability=0.5)
    # One epoch, and no look beyond it but that of the threads.
    with open_loader(mixture, num_threads=4, prefetch=4) as loader:
        for _ in itertools.islice(loader, num_shards):
            pass
    mixture.close()
    # A shard that straddles two windows is needed twice at most; the second epoch's first windows come on top.
    ahead = (4 + 5 * 4) * 16 // window + 2
    assert len(fetched) <= num_shards + ahead * (window // 16 + 1)
    assert max(Counter(fetched).values()) <= 2


@pytest.fixture
def no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    wait_until(
        lambda: not set(threading.enumerate()) - before,
        lambda: f"still running: {set(threading.enumerate()) - before}",
        timeout_s=60,
    )


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_close_ends_the_threads(dataset: LatentDataset, num_threads: int, no_leaked_threads: None) -> None:
    loader = open_loader(mix(dataset), num_threads=num_threads)
    next(loader)
    loader.close()
    loader.close()
    assert list(loader) == []
    open_loader(mix(dataset), num_threads=num_threads).close()  # never read


@pytest.mark.parametrize("num_threads", [0, 2])
def test_damage_met_by_a_thread_reaches_the_trainer(tmp_path: Path, num_threads: int, no_leaked_threads: None) -> None:
    write_dataset(tmp_path, SHARD_SIZES)
    shard = tmp_path / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with open_loader(mix(LatentDataset.open(tmp_path, "codec")), num_threads=num_threads) as loader:
        with pytest.raises(InputError, match=r"^\S*shard-000001\.tar: has ") as caught:
            list(itertools.islice(loader, 10))
        assert "Traceback" not in str(caught.value)
        assert list(loader) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs CUDA")
def test_batches_are_pinned(dataset: LatentDataset) -> None:
    with open_loader(mix(dataset), finish=lambda batch: (batch.latents, batch.positions), pin_memory=True) as loader:
        assert all(tensor.is_pinned() for tensor in next(loader))


def test_a_bug_in_finish_keeps_its_traceback(dataset: LatentDataset) -> None:
    def finish(batch: MicroBatch) -> None:
        raise ZeroDivisionError("a bug")

    with (
        open_loader(mix(dataset), finish=finish) as loader,
        pytest.raises(ZeroDivisionError, match=r"(?s)test_loader\.py.*a bug"),
    ):
        next(loader)
