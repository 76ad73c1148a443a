"""Every metric a run may log, with its unit. Names are stable: dashboards and scripts are built on them."""

from __future__ import annotations

METRICS: dict[str, str] = {
    "train/loss": "training loss, mean over the samples since the last row",
    "train/grad_norm": "global gradient norm before clipping, mean over the steps since the last row",
    "train/learning_rate": "learning rate of the last step",
    "data/epoch": "how often the dataset was gone through; of a mixture, data/epoch/NAME for each dataset",
    "data/epoch_min": "the same for the latent shape that was gone through least, where there are several",
    "data/epoch_max": "the same for the latent shape that was gone through most, where there are several",
    "data/bad_samples": "samples of this run that could not be read and were left out, each counted once",
    "speed/samples_per_s": "samples per second over all ranks, without validation, sampling and saving",
    "speed/step_time_s": "seconds per optimiser step, mean",
    "speed/data_wait_share": "share of the step time spent waiting for data, 0 to 1",
    "speed/mfu": "model FLOP/s over the data-sheet peak of the devices, 0 to 1",
    "memory/peak_gib": "peak memory of this process in GiB: allocated on the GPU, or resident without one",
    "host/cpu_percent": "CPU use of the whole host in percent, mean since the last row",
    "host/memory_gib": "memory in use on the whole host, GiB",
    "host/process_memory_gib": "resident memory of this process, GiB",
    "encode/seconds": "seconds since this task began with its items",
    "encode/items_per_s": "items encoded or given up per second by this task, since it started",
    "encode/gigabytes": "bytes of shards written by this task, in GB",
    "encode/failed": "items that this task could not encode",
    "encode/captions_cut": "captions of which only the first max_length tokens were kept",
    "encode/busy_share": "share of the time in which this task's encoder did not wait for decoding or writing, 0 to 1",
    "encode/eta_s": "seconds until this task's items are done, at the speed so far",
    "checkpoint/stall_s": "seconds that training stood still for the save which has just been completed",
    "checkpoint/total_s": "seconds from the start of that save until it was complete",
    "faults/skipped_steps": "steps of this incarnation that were left out, since loss or gradient was not finite",
    "faults/rollbacks": "how often this run went back to a checkpoint, since it diverged",
    "ranks/compute_slowdown": "seconds of a fixed computation on the slowest rank over those of the median rank",
    "ranks/slowest_rank": "the rank that is slowest at it",
    "ranks/slowest_host": "its host",
    "ranks/data_wait_excess_share": "how much longer than the median rank one waits for data, over the step time",
    "ranks/data_wait_rank": "the rank that waits longest for data",
    "straggler/rank": "the rank that holds the others up; what follows is measured there, once it has been named",
    "straggler/host": "its host",
    "straggler/cpu_percent": "CPU use of that host in percent, while the other ranks wait",
    "straggler/load_per_cpu": "its processes that run or wait to, mean of the last minute, over its cores",
    "straggler/memory_gib": "memory in use on that host, GiB",
    "straggler/process_memory_gib": "resident memory of that rank's process, GiB",
    "straggler/gpu_clock_mhz": "clock of that rank's GPU",
    "straggler/gpu_max_clock_mhz": "its highest clock",
    "straggler/gpu_temperature_c": "its temperature",
    "straggler/gpu_power_w": "the power it draws",
    "straggler/gpu_percent": "share of the time in which it computed, in percent",
    "straggler/gpu_memory_gib": "its memory in use, GiB",
    "straggler/gpu_throttled_by": "why its clock is held down, in NVML's words; empty if it is not",
    "preflight/matmul_tflops": "matrix products at the start, TFLOP/s of the median rank",
    "preflight/matmul_slowest_tflops": "the same of the slowest rank",
    "preflight/write_gb_per_s": "writing into the run folder at the start, with fsync, GB/s of the median host",
    "preflight/write_slowest_gb_per_s": "the same of the slowest host",
    "preflight/all_reduce_gb_per_s": "all-reduce over all ranks at the start, bus bandwidth in GB/s",
    "validation/loss": "held-out loss with noise fixed for the whole run",
    "validation/bad_samples": "held-out samples that could not be read and do not count in the held-out loss",
}

WALL_TIME: dict[str, str] = {
    "productive": "steps that count",
    "lost": "steps done again, since the run went back to a checkpoint",
    "queue": "waiting for machines",
    "down": "between two incarnations; after a kill also the seconds before it that were not written yet",
    "start_up": "from the start of the process to its first batch",
    "compile": "the first step of an incarnation",
    "data_wait": "waiting for data",
    "checkpoint_stall": "training held up by saving",
    "evaluation": "validation and pictures",
    "rollback": "going back to a checkpoint",
    "other": "anything else",
}
"""What the wall time of a run is spent on, in the order in which it is shown."""

VALIDATION_BIN_PREFIX = "validation/loss_bin_"
GOODPUT_PREFIX, GOODPUT_SUFFIX = "goodput/", "_share"
EVALUATION_PREFIX = "evaluation/"
EPOCH_PREFIXES = {
    "data/epoch/": "how often dataset {} was gone through",
    "data/epoch_min/": "how often the latent shape of dataset {} that was gone through least was gone through",
    "data/epoch_max/": "how often the latent shape of dataset {} that was gone through most was gone through",
}


def validation_bin(index: int) -> str:
    """Name of the held-out loss of time bin `index` (0 = nearest to the data), e.g. validation/loss_bin_00."""
    return f"{VALIDATION_BIN_PREFIX}{index:02d}"


def evaluation_name(evaluation: str, figure: str) -> str:
    """Name of a figure that jobs measure of checkpoints, e.g. evaluation/digits/accuracy_generated."""
    return f"{EVALUATION_PREFIX}{evaluation}/{figure}"


def goodput_share(kind: str) -> str:
    """Name of the share of all wall time, queue and pauses included, that went into a kind of WALL_TIME.

    goodput/productive_share is how much of it went into steps that count.
    """
    return f"{GOODPUT_PREFIX}{kind}{GOODPUT_SUFFIX}"


def describe(name: str) -> str:
    """Meaning and unit of a metric; empty for a name that this list does not know."""
    if name.startswith(VALIDATION_BIN_PREFIX):
        return f"held-out loss of time bin {int(name.removeprefix(VALIDATION_BIN_PREFIX))} (0 = nearest to the data)"
    if name.startswith(GOODPUT_PREFIX):
        kind = name.removeprefix(GOODPUT_PREFIX).removesuffix(GOODPUT_SUFFIX)
        return f"share of the run's wall time, over all incarnations: {WALL_TIME.get(kind, kind)}"
    if name.startswith(EVALUATION_PREFIX) and name.count("/") > 1:
        evaluation, figure = name.removeprefix(EVALUATION_PREFIX).split("/", 1)
        return f"{figure} of the checkpoint at these samples, measured by evaluation {evaluation}"
    for prefix, meaning in EPOCH_PREFIXES.items():
        if name.startswith(prefix):
            return meaning.format(name.removeprefix(prefix))
    return METRICS.get(name, "")
