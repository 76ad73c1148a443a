"""`pomscale ema`: an average of the weights whose length is chosen after training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.checkpoint.store import read_meta, read_tensors
from pomscale.pretrained.exported import groups
from pomscale.pretrained.post_hoc import ExponentialProfile, PowerProfile, Profile, fit
from pomscale.pretrained.weights import Precision, open_weights, parameter_shapes, write_weights
from pomscale.runs.checkpoint_folder import complete_checkpoints
from pomscale.runs.layout import EMA_FOLDER

_POWER = "power-"  # names of power-function averages are this and their width, as in EmaConfig.averages


@dataclass(frozen=True)
class PostHocAverage:
    """What `export_post_hoc` made: its name, when the profile ends, of how many snapshots, how well they fit."""

    name: str
    samples: int
    num_snapshots: int
    relative_error: float

    def __str__(self) -> str:
        return (
            f"{self.name} at {self.samples:,} samples from {self.num_snapshots} snapshots; its profile is off by "
            f"{100 * self.relative_error:.3g}% (L2, relative)"
        )


def export_post_hoc(
    run: Path,
    out: Path,
    *,
    width: float | None = None,
    halflife_samples: int | None = None,
    samples: int | None = None,
    dtype: Precision = "fp32",
) -> PostHocAverage:
    """Write an average that training did not keep to the new folder `out`, from the snapshots in RUN/ema.

    Give the width of a power function (EDM2's sigma_rel) or a half-life. The average ends at the last snapshot with at
    most `samples` seen; None: the last of all. Holds a few copies of one tensor. Raises InputError if there are too few
    snapshots, or the width is impossible.
    """
    times = _snapshot_times(run, samples)
    last, end = list(times.items())[-1]
    name, wanted = _wanted(width, halflife_samples, end)
    source = open_weights(last)
    powers = [average for average in source.card.averages if average.startswith(_POWER)]
    sources = [(folder, average) for folder in times for average in powers]
    profiles = [
        PowerProfile.of_width(float(average.removeprefix(_POWER)), times[folder]) for folder, average in sources
    ]
    result = fit(profiles, wanted)
    coefficients: dict[Path, dict[str, float]] = {folder: {} for folder in times}
    for (folder, average), coefficient in zip(sources, result.coefficients, strict=True):
        coefficients[folder][average] = coefficient
    provenance = {
        **source.provenance,
        "weights": name,
        "relative_error": result.relative_error,
        "snapshots": [{"samples": times[folder], **of_average} for folder, of_average in coefficients.items()],
    }
    card = source.card.model_copy(update={"averages": (name,)})
    shapes = parameter_shapes(card.model)
    write_weights(out, card, provenance, shapes, {name: _combine(shapes, coefficients)}, dtype)
    return PostHocAverage(name, end, len(times), result.relative_error)


def _snapshot_times(run: Path, samples: int | None) -> dict[Path, int]:
    """Samples seen, by snapshot folder, oldest first, at most `samples`."""
    times = {folder: int(read_meta(folder)["samples"]) for folder in complete_checkpoints(run / EMA_FOLDER)}
    chosen = {folder: time for folder, time in times.items() if samples is None or time <= samples}
    if not chosen:
        before = "" if samples is None else f" of at most {samples:,} samples"
        raise InputError(f"{run / 'ema'}: no snapshots{before}; `ema.post_hoc` in the recipe makes training keep them")
    return chosen


def _wanted(width: float | None, halflife_samples: int | None, end: int) -> tuple[str, Profile]:
    if (width is None) == (halflife_samples is None):
        raise InputError("ema: give either a width or a half-life")
    if halflife_samples is not None:
        if halflife_samples < 1:
            raise InputError(f"ema: a half-life of {halflife_samples} samples; it must be at least 1")
        return f"halflife-{halflife_samples}", ExponentialProfile(halflife_samples, end)
    assert width is not None
    if not 0 < width < 12**-0.5:
        raise InputError(f"ema: --width {width:g}: a power function's lies between 0 and {12**-0.5:.3f}")
    return f"{_POWER}{width:g}", PowerProfile.of_width(width, end)


def _combine(shapes: Mapping[str, Sequence[int]], coefficients: Mapping[Path, Mapping[str, float]]) -> Iterator[Tensor]:
    """Parameters in the order of `shapes`: sums over snapshots and their averages, in fp64, as terms may cancel."""
    for number, group in enumerate(groups(shapes)):
        sums = {name: torch.zeros(tuple(shape), dtype=torch.float64) for name, shape in group.items()}
        for folder, of_average in coefficients.items():
            read = {
                average: {name: torch.empty_like(t, dtype=torch.float32) for name, t in sums.items()}
                for average in of_average
            }
            read_tensors(folder, {"ema": read}, check=number == 0)
            for average, coefficient in of_average.items():
                for name, total in sums.items():
                    total.add_(read[average][name], alpha=coefficient)
        yield from (total.float() for total in sums.values())
