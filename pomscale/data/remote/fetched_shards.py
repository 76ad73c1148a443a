"""Shards that must be fetched before they are read: once for all threads, and ahead of their use."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

# Number of shards that are kept although they were not announced.
_NUM_UNANNOUNCED = 2

# drop(num_bytes) drops so many bytes of shards, opened longest ago first, to make room; False if there are none.
Drop = Callable[[int], bool]

# fetch(shard, stop, ahead, drop) -> all bytes of the shard, (num_bytes,) uint8; None if it cannot be fetched ahead at
# this moment. It raises soon after `stop` is set.
Fetch = Callable[[int, threading.Event, bool, Drop], np.ndarray | None]


class FetchedShards:
    """`ShardFiles` over a function that fetches one shard.

    It keeps the shards of the last two announcements and the last _NUM_UNANNOUNCED of the others.
    """

    reads_ahead = True

    def __init__(self, fetch: Fetch, num_threads: int, discard: Callable[[int], None] | None = None) -> None:
        """Use `fetch` in `num_threads` background threads.

        `discard` deletes the copy of a shard, so that the next fetch makes a fresh one; None = there are no copies.
        """
        self._fetch = fetch
        self._discard = discard
        self._num_threads = num_threads
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        # Guards what follows. The background threads wait on it.
        self._changed = threading.Condition()
        self._shards: OrderedDict[int, Future[np.ndarray | None]] = OrderedDict()  # opened last comes last
        self._announced: tuple[int, ...] = ()
        self._announced_before: tuple[int, ...] = ()
        self._ahead: deque[int] = deque()
        self._renewed: set[int] = set()

    def open(self, shard: int) -> np.ndarray:
        while True:
            with self._changed:
                is_new = shard not in self._shards
                future = self._start(shard) if is_new else self._shards[shard]
                self._shards.move_to_end(shard)
            if is_new:
                self._run(shard, future, ahead=False)
            content = future.result()
            if content is not None:  # else a background thread had begun, and could not
                return content

    def will_need(self, shards: Sequence[int]) -> None:
        with self._changed:
            # The same list again must not replace the one before it.
            if self._stop.is_set() or tuple(shards) == self._announced:
                return
            self._announced_before, self._announced = self._announced, tuple(shards)
            self._ahead = deque(shards)
            self._drop_unneeded()
            self._changed.notify_all()
            if not self._threads:
                # Daemons, so that a process that ends without `close` does not wait for them.
                self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._num_threads)]
                for thread in self._threads:
                    thread.start()

    def renew(self, shard: int) -> bool:
        if self._discard is None:
            return False
        with self._changed:
            # Only once: bytes that are wrong again are wrong in the dataset. Others may still hold the old copy.
            if shard not in self._renewed:
                self._discard(shard)
                self._renewed.add(shard)
                self._shards.pop(shard, None)
        return True

    def close(self) -> None:
        with self._changed:
            self._stop.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        with self._changed:
            self._shards.clear()

    def _work(self) -> None:
        while not self._stop.is_set():
            self._fetch_next()  # a function of its own, so that a waiting thread keeps no shard alive

    def _fetch_next(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ahead or self._stop.is_set())
            if self._stop.is_set():
                return
            shard = self._ahead.popleft()
            if shard in self._shards:
                return
            future = self._start(shard)
        self._run(shard, future, ahead=True)

    def _start(self, shard: int) -> Future[np.ndarray | None]:
        future: Future[np.ndarray | None] = Future()
        self._shards[shard] = future
        self._drop_unneeded()
        return future

    def _run(self, shard: int, future: Future[np.ndarray | None], *, ahead: bool) -> None:
        """Fetch a shard for all threads that wait for it. After a failure the next to open it tries again."""
        try:
            content = self._fetch(shard, self._stop, ahead, functools.partial(self._drop, ahead))
        except BaseException as error:  # noqa: BLE001  raised where the shard is opened
            self._forget(shard)
            future.set_exception(error)
            return
        if content is None:
            self._forget(shard)
        future.set_result(content)

    def _forget(self, shard: int) -> None:
        with self._changed:
            self._shards.pop(shard, None)

    def _drop(self, ahead: bool, num_bytes: int) -> bool:
        """Drop shards (`Drop`): announced ones last, and not at all for a shard that is fetched ahead."""
        with self._changed:
            idle = [shard for shard, future in self._shards.items() if future.done()]
            announced = set(self._announced)
            others = [shard for shard in idle if shard not in announced]
            dropped = 0
            for shard in others if ahead else others + [shard for shard in idle if shard in announced]:
                if dropped >= num_bytes:
                    break
                content = self._shards.pop(shard).result()
                dropped += 0 if content is None else content.nbytes
        return dropped > 0

    def _drop_unneeded(self) -> None:
        needed = {*self._announced, *self._announced_before}
        others = [shard for shard in self._shards if shard not in needed]
        for shard in others[: max(0, len(others) - _NUM_UNANNOUNCED)]:
            if self._shards[shard].done():
                del self._shards[shard]
