"""Speed of a run: seconds per step, samples per second, share of waiting, MFU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepTimer:
    """Timer of one interval between two rows of metrics.

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
        """Count the block, which fetches a batch, as waiting for data."""
        start_s = self._clock()
        yield
        self._data_wait_s += self._clock() - start_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the block, which is no training: validation, sampling or saving."""
        start_s = self._clock()
        yield
        self._paused_s += self._clock() - start_s

    def count_step(self, num_samples: int) -> None:
        """Count an optimiser step with a global batch of `num_samples`."""
        self._num_steps += 1
        self._num_samples += num_samples

    def metrics(self) -> dict[str, float]:
        """Return the interval's speed/* metrics (empty without a step), and start the next interval."""
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
    """Return the model FLOPs utilisation, 0 to 1 (PaLM, arXiv 2204.02311, appendix B).

    Args:
        samples_per_s: samples per second over all devices.
        training_flops_per_sample: of forward and backward pass, without the recomputation of activation checkpointing.
        num_devices: number of devices.
        peak: FLOP/s of one device.
    """
    return samples_per_s * training_flops_per_sample / (num_devices * peak)
