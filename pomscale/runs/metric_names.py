"""Every metric a run may log, with its unit. Names are stable: dashboards and scripts are built on them."""

from __future__ import annotations

METRICS: dict[str, str] = {
    "train/loss": "diffusion loss, without the alignment loss, mean over the samples since the last row",
    "train/alignment_loss": "alignment loss without its weight: - cosine of projections and the teacher's features, -1 "
    "to 1, mean over the samples since the last row",
    "train/grad_norm": "global gradient norm before clipping, mean over the steps since the last row",
    "train/learning_rate": "learning rate of the last step",
    "data/epoch": "number of passes over the dataset so far; of a mixture, data/epoch/NAME for each dataset",
    "data/epoch_min": "number of passes over the latent shape with the fewest, where there are several",
    "data/epoch_max": "number of passes over the latent shape with the most, where there are several",
    "data/bad_samples": "samples of this run that could not be read and were left out, each counted once",
    "speed/samples_per_s": "samples per second over all ranks, without validation, sampling and saving",
    "speed/step_time_s": "seconds per optimiser step, mean",
    "speed/data_wait_share": "share of the step time spent waiting for data, 0 to 1",
    "speed/mfu": "model FLOP/s, without recomputation, over the data-sheet peak of the devices, 0 to 1",
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
    "faults/skipped_steps": "steps of this start that were left out, since loss or gradient was not finite",
    "faults/rollbacks": "number of times that this run diverged and went back to a checkpoint",
    "ranks/compute_slowdown": "seconds of a fixed computation on the slowest rank over those of the median rank",
    "ranks/slowest_rank": "rank that is slowest at this computation",
    "ranks/slowest_host": "host of the rank that is slowest at this computation",
    "ranks/data_wait_excess_share": "how much longer than the median rank one rank waits for data, over the step time",
    "ranks/data_wait_rank": "rank that waits longest for data",
    "straggler/rank": "rank that holds the others up, once it is known; all of straggler/ is measured there",
    "straggler/host": "host of that rank",
    "straggler/cpu_percent": "CPU use of that host in percent, while the other ranks wait",
    "straggler/load_per_cpu": "processes of that host that run or wait, mean of the last minute, over its cores",
    "straggler/memory_gib": "memory in use on that host, GiB",
    "straggler/process_memory_gib": "resident memory of that rank's process, GiB",
    "straggler/gpu_clock_mhz": "clock of that rank's GPU",
    "straggler/gpu_max_clock_mhz": "highest clock of that GPU",
    "straggler/gpu_temperature_c": "temperature of that GPU",
    "straggler/gpu_power_w": "power that the GPU draws",
    "straggler/gpu_percent": "share of the time in which that GPU computed, in percent",
    "straggler/gpu_memory_gib": "memory of that GPU in use, GiB",
    "straggler/gpu_throttled_by": "why the clock of that GPU is held down, in NVML's words; empty if it is not",
    "preflight/matmul_tflops": "matrix products at the start, TFLOP/s of the median rank",
    "preflight/matmul_slowest_tflops": "matrix products at the start, TFLOP/s of the slowest rank",
    "preflight/write_gb_per_s": "writing into the run folder at the start, with fsync, GB/s of the median host",
    "preflight/write_slowest_gb_per_s": "writing into the run folder at the start, with fsync, GB/s of the slowest",
    "preflight/all_reduce_gb_per_s": "bus bandwidth of an all-reduce over all ranks at the start, GB/s",
    "validation/loss": "held-out loss with noise fixed for the whole run, in the space of the training loss",
    "validation/v_loss": "held-out error of v of flow matching at t from 0.05 to 0.95, the same for every objective",
    "validation/bad_samples": "held-out samples that could not be read and do not count in the held-out loss",
}

WALL_TIME: dict[str, str] = {
    "productive": "steps that count",
    "lost": "steps done again, since the run went back to a checkpoint",
    "queue": "waiting for machines",
    "down": "between two starts; after a kill also the seconds before it that were not written yet",
    "start_up": "from the start of the process to its first batch",
    "compile": "the first step of a start",
    "data_wait": "waiting for data",
    "checkpoint_stall": "training held up by saving",
    "evaluation": "validation and pictures",
    "rollback": "going back to a checkpoint",
    "other": "anything else",
}
"""Kinds of wall time of a run, in the order in which they are shown."""

VALIDATION_BIN_PREFIX = "validation/loss_bin_"
GOODPUT_PREFIX, GOODPUT_SUFFIX = "goodput/", "_share"
EVALUATION_PREFIX = "evaluation/"
OTHER_SETTINGS = "@"  # evaluation/NAME@KEY/FIGURE: measured with other settings than evaluation/NAME/FIGURE

QUALITY = ("fid", "fdd", "fvd", "cmmd", "kid", "inception_score", "clip_score")
"""Figures of generated samples, the one that people ask for first in front."""

EPOCH_PREFIXES = {
    "data/epoch/": "number of passes over dataset {} so far",
    "data/epoch_min/": "number of passes over the latent shape of dataset {} with the fewest",
    "data/epoch_max/": "number of passes over the latent shape of dataset {} with the most",
}


def validation_bin(index: int) -> str:
    """Name of the held-out loss of time bin `index` (0 = nearest to the data), e.g. validation/loss_bin_00."""
    return f"{VALIDATION_BIN_PREFIX}{index:02d}"


def evaluation_name(evaluation: str, figure: str) -> str:
    """Name of a figure that jobs measure of checkpoints, e.g. evaluation/digits/accuracy_generated."""
    return f"{EVALUATION_PREFIX}{evaluation}/{figure}"


def evaluation_of(name: str) -> str:
    """Return NAME or NAME@KEY of a figure evaluation/NAME/FIGURE or evaluation/NAME@KEY/FIGURE."""
    return name.removeprefix(EVALUATION_PREFIX).partition("/")[0]


def plain_figure(name: str) -> str:
    """Return the name of a figure without the key of its settings, evaluation/NAME/FIGURE."""
    evaluation, _, figure = name.removeprefix(EVALUATION_PREFIX).partition("/")
    return evaluation_name(evaluation.partition(OTHER_SETTINGS)[0], figure)


def goodput_share(kind: str) -> str:
    """Name of the share of all wall time, queue and pauses included, that went into a kind of WALL_TIME.

    goodput/productive_share is the share of steps that count.
    """
    return f"{GOODPUT_PREFIX}{kind}{GOODPUT_SUFFIX}"


def describe(name: str) -> str:
    """Meaning and unit of a metric; empty for a name that this list does not know."""
    if name.startswith(VALIDATION_BIN_PREFIX):
        return f"held-out loss of time bin {int(name.removeprefix(VALIDATION_BIN_PREFIX))} (0 = nearest to the data)"
    if name.startswith(GOODPUT_PREFIX):
        kind = name.removeprefix(GOODPUT_PREFIX).removesuffix(GOODPUT_SUFFIX)
        return f"share of the run's wall time, over all starts: {WALL_TIME.get(kind, kind)}"
    if name.startswith(EVALUATION_PREFIX) and name.count("/") > 1:
        evaluation, figure = name.removeprefix(EVALUATION_PREFIX).split("/", 1)
        evaluation, _, key = evaluation.partition(OTHER_SETTINGS)
        other = f" with other settings ({key})" if key else ""
        return f"{figure} of the checkpoint at these samples, measured by evaluation {evaluation}{other}"
    for prefix, meaning in EPOCH_PREFIXES.items():
        if name.startswith(prefix):
            return meaning.format(name.removeprefix(prefix))
    return METRICS.get(name, "")
