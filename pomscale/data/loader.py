"""Load the micro-batches of one rank from a mixture of datasets, read ahead by threads.

torchdata.nodes carries threads, prefetch and pinning; the order is ours, so the loader has no state to save beyond
the number of samples consumed, and starting at any position costs the same.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchdata.nodes import BaseNode, Batcher, IterableWrapper, ParallelMapper, PinMemory, Prefetcher, Unbatcher

from pomscale.base.errors import InputError, PomscaleError
from pomscale.data.bad_samples import BadSample
from pomscale.data.mixture import Mixture

T = TypeVar("T")
P = TypeVar("P")

# Most micro-batches that threads hand over at a time: handing one over costs as much as a third of reading it.
_MOST_AT_ONCE = 4

Piece = tuple[np.ndarray, np.ndarray]
"""Positions (b,) int64 and weights (b,) float32 of a micro-batch."""

Span = tuple[int, int]
"""First and last position of a step."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass of one rank, on the CPU, all latents of one shape.

    A sample of weight 0 takes no part in the loss: it is padding, or it is bad (and listed, once, in `bad`).
    """

    # (b, c, h, w) or (b, c, f, h, w), not normalised; float16, float32 where drawn from moments, or uint8 pixels
    latents: Tensor
    condition: Tensor  # (b,) int64, class ids; NO_LABEL (-1) where the datasets have no classes
    text: Tensor | None  # (b, n, dim) float16, zero after each row's length
    text_lengths: Tensor | None  # (b,) int64
    positions: Tensor  # (b,) int64, global positions
    weights: Tensor  # (b,) float32, 1 or 0
    bad: tuple[BadSample, ...]
    # (b, n, dim) float16, n = product of the grid: a teacher's, of the flipped picture where it is flipped; None if
    # they are not read
    features: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ReadAhead:
    """Threads and buffers that read micro-batches ahead.

    Attributes:
        num_threads: Number of reader threads.
        prefetch: Micro-batches that are kept ready.
        pin_memory: Whether results are pinned for the copy to a GPU.
    """

    num_threads: int
    prefetch: int
    pin_memory: bool = False


def num_micro_batches(global_batch: int, world_size: int, micro_batch: int | None) -> int:
    """Return the micro-batches per step, the same on every rank, since collectives in a forward pass must meet.

    Raises InputError if there are more ranks than samples in a step.
    """
    if world_size > global_batch:
        raise InputError(
            f"training.global_batch: {global_batch} samples cannot be shared by {world_size} ranks; "
            f"use at most {global_batch} ranks or a larger global batch"
        )
    largest_slice = -(-global_batch // world_size)
    return 1 if micro_batch is None else -(-largest_slice // micro_batch)


def micro_batch_positions(
    start: int, *, global_batch: int, micro_batch: int | None, rank: int, world_size: int
) -> Iterator[Piece]:
    """Yield one rank's micro-batches, endlessly, from position `start` on.

    Step s covers positions [s G, (s+1) G) with the global batch G. Rank r of R takes the slice
    [r G // R, (r+1) G // R) of it, cut into `num_micro_batches` near-even pieces. Slices differ by at most one sample,
    so a piece may be empty on some ranks: it then repeats a position of the rank with weight 0.
    """
    num_pieces = num_micro_batches(global_batch, world_size, micro_batch)
    begin, end = rank * global_batch // world_size, (rank + 1) * global_batch // world_size
    cuts = [begin + (end - begin) * piece // num_pieces for piece in range(num_pieces + 1)]
    while True:
        for first, last in itertools.pairwise(cuts):
            positions = start + np.arange(first, max(last, first + 1), dtype=np.int64)
            yield positions, np.full(len(positions), float(last > first), np.float32)
        start += global_batch


class ReaderThreads(Generic[P, T]):
    """Endless iterator over one rank's micro-batches, which threads read ahead, in order.

    A PomscaleError in a reader thread is raised by `next`, once the batches before it were returned. Use it as a
    context manager, or call `close`, to end the threads.

    Micro-batches are read, pinned and kept ready in groups of min(4, prefetch). At most `prefetch` of them, up to whole
    groups, are ready; besides, each of the `num_threads` has one group, one may be being pinned, and one is being
    returned.
    """

    def __init__(
        self,
        mixture: Mixture,
        pieces: Iterator[P],
        span: Callable[[P], Span],
        read: Callable[[P], T],
        ahead: ReadAhead,
    ) -> None:
        """Start to read.

        Args:
            mixture: The datasets.
            pieces: What belongs to each micro-batch, endlessly, in order.
            span: Returns the step that a piece belongs to.
            read: Reads a piece; several threads call it at once. With `ahead.pin_memory` torch must be able to pin its
                result: a tensor, a container of tensors, or an object with pin_memory().
            ahead: Threads, prefetch and pinning.
        """
        self._span, self._read = span, read
        self._reading = _Reading(mixture)
        # torchdata's threads call torch.set_num_threads(1), which a thread that has not computed yet would take over.
        # Asked for its number, this one keeps it.
        torch.get_num_threads()
        at_once = min(_MOST_AT_ONCE, ahead.prefetch)
        noted = self._reading.noted((piece, span(piece)) for piece in pieces)
        node: BaseNode = Batcher(IterableWrapper(noted), at_once)
        # snapshot_frequency=0: torchdata need not track a state that one integer describes.
        node = ParallelMapper(
            node,
            self._read_all,
            ahead.num_threads,
            in_order=True,
            method="thread",
            max_concurrent=ahead.num_threads,
            snapshot_frequency=0,
        )
        if ahead.pin_memory:
            node = PinMemory(node, "cuda", snapshot_frequency=0)
        node = Prefetcher(node, -(-ahead.prefetch // at_once), snapshot_frequency=0)
        self._node: BaseNode | None = Unbatcher(node)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._node is None:
            raise StopIteration
        item = next(self._node)
        if isinstance(item, PomscaleError):
            self.close()
            raise item
        return item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the reader threads. Safe to call twice; a closed loader yields nothing more."""
        # torchdata's nodes stop and join their threads when the last reference to them goes.
        self._node = None

    def _read_all(self, pieces: list[P]) -> list[T | PomscaleError]:
        return [self._read_one(piece) for piece in pieces]

    def _read_one(self, piece: P) -> T | PomscaleError:
        try:
            with self._reading.of(self._span(piece)):
                return self._read(piece)
        except PomscaleError as error:
            # Returned, not raised: torchdata would bury the message for people in a traceback of its own.
            return error


class Loader(ReaderThreads[Piece, T]):
    """Endless iterator over one rank's micro-batches of one shape, `num_micro_batches` per step, in order."""

    def __init__(
        self,
        mixture: Mixture,
        *,
        micro_batch: int | None,
        rank: int,
        world_size: int,
        start_position: int,
        ahead: ReadAhead,
        finish: Callable[[MicroBatch], T],
    ) -> None:
        """Start to read.

        Args:
            mixture: The datasets.
            micro_batch: Most samples of a micro-batch; None for a whole slice.
            rank: Number of this rank.
            world_size: Number of ranks.
            start_position: Position of the first sample, a multiple of the global batch.
            ahead: Threads, prefetch and pinning.
            finish: Turns a MicroBatch into the trainer's batch, inside the reader threads. With `ahead.pin_memory`
                torch must be able to pin its result: a tensor, a container of tensors, or an object with pin_memory().
        """
        global_batch = mixture.order.global_batch
        if start_position % global_batch:
            raise InputError(
                f"the run has seen {start_position:,} samples, which is no multiple of training.global_batch "
                f"{global_batch}; the global batch is fixed for a run, so resume with the one it started with"
            )
        self.global_batch = global_batch
        self.num_micro_batches = num_micro_batches(global_batch, world_size, micro_batch)
        pieces = micro_batch_positions(
            start_position, global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=world_size
        )

        def span(piece: Piece) -> Span:
            first = int(piece[0][0]) // global_batch * global_batch
            return first, first + global_batch - 1

        def read(piece: Piece) -> T:
            return finish(read_micro_batch(mixture, *piece))

        super().__init__(mixture, pieces, span, read, ahead)


def read_micro_batch(mixture: Mixture, positions: np.ndarray, weights: np.ndarray) -> MicroBatch:
    """Read the samples at positions (b,) int64 that have one shape; weights (b,) float32 become 0 where one is bad."""
    samples = mixture.read(positions)
    bad = tuple(sample for row, sample in samples.bad.items() if weights[row])
    weights[list(samples.bad)] = 0
    return MicroBatch(
        latents=samples.latents,
        condition=samples.labels,
        text=samples.text,
        text_lengths=samples.text_lengths,
        positions=torch.from_numpy(positions),
        weights=torch.from_numpy(weights),
        bad=bad,
        features=samples.features,
    )


class _Reading:
    """Announces to the datasets which steps are being read, by several threads at once, whenever that changes.

    A step is announced once it is read and not when it is queued, together with all later ones that are being read: a
    dataset may drop the shards that are no longer announced.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._lock = threading.Lock()
        self._unread: deque[int] = deque()  # first positions of the steps of the pieces that are queued or being read
        self._read: list[int] = []  # a heap of those that are read, while pieces before them are not
        self._newest: Span = (-1, -1)

    def noted(self, pieces: Iterator[tuple[P, Span]]) -> Iterator[P]:
        """Yield the pieces on their way to the threads, noting the step of each. Called by one thread."""
        for piece, (first, _) in pieces:
            with self._lock:
                self._unread.append(first)
            yield piece

    @contextmanager
    def of(self, step: Span) -> Iterator[None]:
        """Announce a piece of a step while the block reads it."""
        with self._lock:
            self._newest = max(self._newest, step)
            self._mixture.will_need(self._unread[0], *self._newest)
        yield
        with self._lock:
            heapq.heappush(self._read, step[0])
            while self._read and self._read[0] == self._unread[0]:
                self._unread.popleft()
                heapq.heappop(self._read)
