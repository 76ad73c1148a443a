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
    "validation/loss": "held-out loss with noise fixed for the whole run",
    "validation/bad_samples": "held-out samples that could not be read and do not count in the held-out loss",
}

VALIDATION_BIN_PREFIX = "validation/loss_bin_"
EPOCH_PREFIXES = {
    "data/epoch/": "how often dataset {} was gone through",
    "data/epoch_min/": "how often the latent shape of dataset {} that was gone through least was gone through",
    "data/epoch_max/": "how often the latent shape of dataset {} that was gone through most was gone through",
}


def validation_bin(index: int) -> str:
    """Name of the held-out loss of time bin `index` (0 = nearest to the data), e.g. validation/loss_bin_00."""
    return f"{VALIDATION_BIN_PREFIX}{index:02d}"


def describe(name: str) -> str:
    """Meaning and unit of a metric; empty for a name that this list does not know."""
    if name.startswith(VALIDATION_BIN_PREFIX):
        return f"held-out loss of time bin {int(name.removeprefix(VALIDATION_BIN_PREFIX))} (0 = nearest to the data)"
    for prefix, meaning in EPOCH_PREFIXES.items():
        if name.startswith(prefix):
            return meaning.format(name.removeprefix(prefix))
    return METRICS.get(name, "")
