"""The part of a training recipe that says how pictures and clips are drawn."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from pomscale.config.names import GridName, GuidanceSchedule, SamplerName
from pomscale.config.section import Fraction, PositiveFloat, Section, Seed

DEFAULT_SAMPLER: dict[str, SamplerName] = {"flow": "euler", "eps": "ddim", "x": "heun"}
"""Objective -> the sampler of a recipe that names none."""

DEFAULT_ETA: dict[SamplerName, float] = {"ddim": 0.0, "sde": 1.0}
"""Samplers that take eta -> its value where none is given."""

DEFAULT_RHO = 7.0
FIRST_TIME_AT_LEAST = 0.9
"""An explicit grid begins here or later, since sampling begins with noise alone."""


class SamplingConfig(Section):
    """Options for drawing pictures and clips while training; also the defaults of `pomscale sample`."""

    every_samples: PositiveInt | None = Field(None, description="Draw into the run folder this often; null = never.")
    num_classes: PositiveInt | None = Field(None, description="Classes in the grid, from class 0 on; null = up to 8.")
    prompts: list[Annotated[str, Field(min_length=1)]] = Field([], description="Models of texts: what to draw.")
    text_path: str | None = Field(
        None,
        description="Models of texts: folder of the text encoder on this machine, if not the one that encoded the "
        "captions.",
    )
    num_each: PositiveInt = Field(4, description="Pictures of each class, pictures or clips of each prompt.")
    num_frames: PositiveInt | None = Field(
        None, description="Clips: latent frames; null = as many as model.latent_shape has."
    )
    sampler: SamplerName | None = Field(
        None, description="null follows the objective: euler for flow, ddim for eps, heun for x."
    )
    num_steps: PositiveInt = Field(50, description="Steps of the sampler; of an explicit grid they are counted.")
    eta: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="Noise that is added in each step: ddim 0 (none, the default) to 1 (ddpm); sde 1 by default."
    )
    grid: GridName | None = Field(
        None,
        description="Times of the steps; null follows what is given of shift, rho and times, else the shift of "
        "training (diffusion.time.shift_base_tokens), else uniform: equal steps of t for flow and x, of the angle of "
        "data and noise for eps.",
    )
    shift: PositiveFloat | None = Field(
        None, description="grid shift: factor on noise over data of the uniform grid; s / s0 for sides s and s0."
    )
    rho: PositiveFloat | None = Field(None, description="grid rho (EDM): exponent, 7 by default.")
    times: tuple[Fraction, ...] | None = Field(
        None, description="grid times: the times themselves, decreasing from noise (1) to 0."
    )
    guidance: float = Field(0.0, description="w in pred_c + w (pred_c - pred_u); 0 = off.")
    guidance_interval: tuple[Fraction, Fraction] = Field(
        (0.0, 1.0), description="Times between which guidance is on; outside, a step costs half."
    )
    guidance_schedule: GuidanceSchedule = Field(
        "constant", description="w over t: constant; linear, 2 w (1 - t); cosine, w (1 + cos(pi t))."
    )
    guidance_base_size: PositiveFloat | None = Field(
        None, description="Side s0 of the latents that w was chosen at: at side s it is w s / s0; null = w at any size."
    )
    seed: Seed = 0

    @property
    def grid_name(self) -> GridName:
        """The grid, also where it follows what is given."""
        given: dict[GridName, object] = {"times": self.times, "shift": self.shift, "rho": self.rho}
        names: list[GridName] = [name for name, value in given.items() if value is not None]
        return self.grid or (names[0] if names else "uniform")

    def shifted_as(self, shift: float | None) -> SamplingConfig:
        """Return the options with the shift of training as their grid, unless they choose one or there is none."""
        if shift is None or self.grid is not None or self.grid_name != "uniform":
            return self
        return self.model_copy(update={"shift": shift})

    @model_validator(mode="after")
    def _check_options(self) -> SamplingConfig:
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(
                f"guidance_interval: {low:g} is not below {high:g}; t is 0 at the data and 1 at noise, so an interval "
                f"of 0.1 to 1 that counts from noise to data is 0 to 0.9 here"
            )
        if self.sampler is not None and self.eta is not None:
            check_eta(self.sampler, self.eta)
        for name, value in (("shift", self.shift), ("rho", self.rho), ("times", self.times)):
            if value is not None and name != self.grid_name:
                raise ValueError(f"{name}: the grid is {self.grid_name}, which does not read it; give one of them")
        if self.grid_name == "shift" and self.shift is None:
            raise ValueError("shift: say by how much; for sides s and s0 of pictures or latents it is s / s0")
        if self.grid_name == "times":
            _check_times(self.times)
        return self

    def check_objective(self, objective: str) -> None:
        """Raise ValueError, naming the key, if the options do not fit the objective of a model."""
        if self.eta is not None:
            check_eta(self.sampler or DEFAULT_SAMPLER[objective], self.eta)
        if objective == "eps" and self.times is not None and self.times[0] == 1:
            raise ValueError("times: a model of objective eps cannot begin at t = 1, where no data is left; give 0.999")


def check_eta(sampler: SamplerName, eta: float) -> None:
    """Raise ValueError if a sampler does not take this eta."""
    if sampler == "ddpm":
        raise ValueError("eta: ddpm is ddim with eta 1, and takes no other; use ddim")
    if sampler not in DEFAULT_ETA:
        raise ValueError(f"eta: {sampler} adds no noise; use {' or '.join(DEFAULT_ETA)}, or leave it out")
    if sampler == "ddim" and eta > 1:
        raise ValueError(f"eta: {eta:g} is more noise than a step of ddim may add; give 0 to 1")


def _check_times(times: tuple[float, ...] | None) -> None:
    if times is None or len(times) < 2:
        raise ValueError("times: give at least two, such as 1, 0.5, 0")
    if rising := next((f"{t:g} before {next_t:g}" for t, next_t in pairwise(times) if next_t >= t), None):
        raise ValueError(f"times: they must decrease, from noise (1) to data (0), and have {rising}")
    if times[-1] != 0:
        raise ValueError(f"times: the last must be 0, the data, and is {times[-1]:g}")
    if times[0] < FIRST_TIME_AT_LEAST:
        raise ValueError(
            f"times: the first must be at least {FIRST_TIME_AT_LEAST:g}, since sampling begins with noise alone, "
            f"and is {times[0]:g}"
        )
