"""How fast a run is: seconds per step, samples per second, share of waiting, MFU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepTimer:
    """Accumulates one interval between two rows of metrics.

    All wall time counts, except what happens inside `paused()`. Kernels run asynchronously on a GPU: call
    `metrics()` and enter `paused()` right after something that waits for the device (reading the loss), else
    queued work is charged to what follows.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._restart()

    def _restart(self) -> None:
        self._start_s = self._clock()
        self._data_wait_s = 0.0
        self._paused_s = 0.0
        self._num_steps = 0
        self._num_samples = 0

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Around fetching a batch."""
        start_s = self._clock()
        yield
        self._data_wait_s += self._clock() - start_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training: validation, sampling, saving."""
        start_s = self._clock()
        yield
        self._paused_s += self._clock() - start_s

    def count_step(self, num_samples: int) -> None:
        """One optimiser step is done; num_samples: its global batch."""
        self._num_steps += 1
        self._num_samples += num_samples

    def metrics(self) -> dict[str, float]:
        """The interval's speed/* metrics (empty without a step); starts the next interval."""
        elapsed_s = self._clock() - self._start_s - self._paused_s
        metrics = {}
        if self._num_steps:
            metrics = {
                "speed/samples_per_s": self._num_samples / elapsed_s,
                "speed/step_time_s": elapsed_s / self._num_steps,
                "speed/data_wait_share": self._data_wait_s / elapsed_s,
            }
        self._restart()
        return metrics


def mfu(samples_per_s: float, training_flops_per_sample: float, num_devices: int, peak: float) -> float:
    """Model FLOPs utilisation, 0 to 1 (PaLM, arXiv 2204.02311, appendix B).

    samples_per_s: over all devices. training_flops_per_sample: forward and backward, without the recomputation
    of activation checkpointing. peak: FLOP/s of one device.
    """
    return samples_per_s * training_flops_per_sample / (num_devices * peak)
