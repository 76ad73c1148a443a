"""Post-hoc EMA, `pomscale ema`: an average of the weights whose length is chosen after training.

The method is that of Karras et al. 2024, "EDM2", arXiv 2312.02696: an average of any length is a sum of snapshots of
two. An average at time T weighs the weights of time tau by a profile p(tau), 0 <= tau <= T, of integral 1; a
power-function average by p(tau) = (gamma + 1) tau^gamma / T^(gamma + 1). Since averages are linear, a sum of snapshots
with coefficients x has the profile sum_i x_i p_i. The coefficients that bring it closest to a wanted profile, in the L2
norm, come from the inner products of profiles (section 3.2, appendix C, algorithm 3).

We also demand sum_i x_i = 1, so that a weight that does not move during training is reproduced. Times are in samples.
One step of training averages p over `global_batch` samples, which can only make two profiles more alike: the error that
is reported here bounds that of the discrete averages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.checkpoint.store import read_meta, read_tensors
from pomscale.config.hardware import Precision
from pomscale.engine.averages import power_exponent
from pomscale.pretrained.exported import groups
from pomscale.pretrained.weights import open_weights, parameter_shapes, write_weights
from pomscale.runs.checkpoint_folder import complete_checkpoints
from pomscale.runs.layout import EMA_FOLDER

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)
_POWER = "power-"  # names of power-function averages are this and their width, as in EmaConfig.averages


@dataclass(frozen=True)
class PowerProfile:
    """Profile (exponent + 1) tau^exponent / time^(exponent + 1) on [0, time]."""

    exponent: float
    time: float

    @classmethod
    def of_width(cls, width: float, time: float) -> PowerProfile:
        """Return the profile of a width: its standard deviation over `time` (EDM2's sigma_rel), below 12^(-1/2)."""
        return cls(power_exponent(width), time)

    def inner_product(self, other: PowerProfile) -> float:
        """Return the integral of the product of both profiles."""
        early, late = sorted((self, other), key=lambda profile: profile.time)
        a, b = early.exponent, late.exponent
        return (a + 1) * (b + 1) / (a + b + 1) * (early.time / late.time) ** b / late.time

    def norm_squared(self) -> float:
        return self.inner_product(self)


@dataclass(frozen=True)
class ExponentialProfile:
    """Profile proportional to 2^((tau - time) / halflife) on [0, time]."""

    halflife: float
    time: float

    def inner_product(self, other: PowerProfile) -> float:
        """Return the integral of the product of both profiles.

        Gauss-Legendre quadrature over u = (tau / other.time)^(exponent + 1), which makes the power constant.
        """
        tau = other.time * (0.5 * (_NODES + 1)) ** (1 / (other.exponent + 1))
        return float(0.5 * _WEIGHTS @ np.exp(self._rate * (tau - self.time)) * self._scale)

    def norm_squared(self) -> float:
        return self._scale**2 * -math.expm1(-2 * self._rate * self.time) / (2 * self._rate)

    @property
    def _rate(self) -> float:
        return math.log(2) / self.halflife

    @property
    def _scale(self) -> float:
        return self._rate / -math.expm1(-self._rate * self.time)


class Profile(Protocol):
    """A profile to fit: its inner products with power functions, and with itself."""

    def inner_product(self, other: PowerProfile) -> float: ...

    def norm_squared(self) -> float: ...


@dataclass(frozen=True)
class Fit:
    """Coefficients of the snapshots, in their order, and the error |sum_i x_i p_i - p| / |p| of their sum."""

    coefficients: tuple[float, ...]
    relative_error: float


def fit(snapshots: Sequence[PowerProfile], wanted: Profile) -> Fit:
    """Fit `wanted` by least squares under the constraint sum_i x_i = 1, in float64.

    `wanted` should end at the time of a snapshot.
    """
    count = len(snapshots)
    gram = np.array([[a.inner_product(b) for b in snapshots] for a in snapshots])
    right = np.array([wanted.inner_product(a) for a in snapshots])
    # Profiles of equal norm: late snapshots are as wide as early ones in relative time only.
    scale = 1 / np.sqrt(gram.diagonal())
    system = np.zeros((count + 1, count + 1))
    system[:count, :count] = gram * np.outer(scale, scale)
    system[:count, count] = system[count, :count] = scale / scale.max()
    solution, *_ = np.linalg.lstsq(system, np.append(right * scale, 1 / scale.max()), rcond=None)
    x = solution[:count] * scale
    squared = x @ gram @ x - 2 * x @ right + wanted.norm_squared()
    return Fit(tuple(x.tolist()), math.sqrt(max(0.0, squared) / wanted.norm_squared()))


@dataclass(frozen=True)
class PostHocAverage:
    """The average that `export_post_hoc` wrote.

    Attributes:
        name: Name of the average.
        samples: Samples seen at the end of its profile.
        num_snapshots: Number of snapshot folders that it is made of.
        relative_error: Relative L2 error of its profile.
    """

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

    The memory needed is a few copies of one group of tensors.

    Args:
        run: The run folder.
        out: The folder to make.
        width: Width of a power function (EDM2's sigma_rel); give either this or `halflife_samples`.
        halflife_samples: Half-life of an exponential, in samples.
        samples: The average ends at the last snapshot with at most so many samples seen; None = at the last of all.
        dtype: "fp32" or "bf16".

    Returns:
        A description of the average.

    Raises:
        InputError: There are too few snapshots, or the width is impossible.
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
    card = source.card.for_use.model_copy(update={"averages": (name,)})
    shapes = parameter_shapes(card.model)
    write_weights(out, card, provenance, shapes, {name: _combine(shapes, coefficients)}, dtype)
    return PostHocAverage(name, end, len(times), result.relative_error)


def _snapshot_times(run: Path, samples: int | None) -> dict[Path, int]:
    """Return the samples seen by snapshot folder, oldest first, of those with at most `samples`."""
    times = {folder: int(read_meta(folder)["samples"]) for folder in complete_checkpoints(run / EMA_FOLDER)}
    chosen = {folder: time for folder, time in times.items() if samples is None or time <= samples}
    if not chosen:
        before = "" if samples is None else f" of at most {samples:,} samples"
        raise InputError(
            f"{run / EMA_FOLDER}: no snapshots{before}; training keeps them if the recipe has `ema.post_hoc`"
        )
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
    """Yield the parameters in the order of `shapes`: sums over snapshots and their averages.

    The sums are in fp64, since terms may cancel.
    """
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
