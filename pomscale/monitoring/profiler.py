"""Profiler window: a few steps that the recipe asks to record into the run folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pomscale.config.train import ProfileConfig
from pomscale.runs.layout import memory_history_path, trace_path


class ProfileWindow:
    """Recorder of `num_steps` steps from `start_samples` on; with config None it does nothing.

    Writes RUN/profile/rank-R-trace.json.gz (Chrome trace with memory events; open it in ui.perfetto.dev) and on
    CUDA rank-R-memory.pickle (allocator history; open it in pytorch.org/memory_viz). A run that resumes after
    `start_samples` records nothing.
    """

    def __init__(self, config: ProfileConfig | None, run_folder: Path, rank: int, device: torch.device) -> None:
        self._start_samples = config.start_samples if config else 0
        self._steps_left = config.num_steps if config else 0
        self._trace_path = trace_path(run_folder, rank)
        self._memory_path = memory_history_path(run_folder, rank)
        self._on_cuda = device.type == "cuda"
        self._profiler: profile | None = None
        self._called = False

    def step(self, samples: int) -> None:
        """Begin or end the recording if it is due; call it before every step, with the samples seen so far."""
        if self._steps_left == 0:
            return
        if self._profiler is not None:
            self._steps_left -= 1
            if self._steps_left == 0:
                self.close()
        elif samples >= self._start_samples:
            if self._called or samples == self._start_samples:
                self._start()
            else:
                self._steps_left = 0
        self._called = True

    def _start(self) -> None:
        if self._on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_cuda
        self._profiler = profile(activities=activities, profile_memory=True, record_shapes=True)
        self._profiler.start()

    def close(self) -> None:
        """End the recording and write it, also for a run that ends inside it. Does nothing outside of one."""
        if self._profiler is None:
            return
        self._trace_path.parent.mkdir(exist_ok=True)
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self._trace_path))
        if self._on_cuda:
            torch.cuda.memory._dump_snapshot(str(self._memory_path))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profiler = None
        self._steps_left = 0
