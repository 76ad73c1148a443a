"""Options of sampling, with the recipe's defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict, Unpack

from pydantic import ValidationError

from pomscale.base.errors import InputError
from pomscale.config.names import GridName, GuidanceSchedule, SamplerName
from pomscale.config.sampling import DEFAULT_ETA, DEFAULT_RHO, DEFAULT_SAMPLER, SamplingConfig

_OF_GRID = ("grid", "shift", "rho", "times")


class SamplingArguments(TypedDict, total=False):
    """Fields of SamplingOptions as keyword arguments."""

    sampler: SamplerName | None
    num_steps: int
    guidance: float
    guidance_interval: tuple[float, float]
    guidance_schedule: GuidanceSchedule
    guidance_base_size: float | None
    eta: float | None
    grid: GridName | None
    shift: float | None
    rho: float | None
    times: tuple[float, ...] | None


class SamplingChanges(TypedDict, total=False):
    """Options that differ from the recipe's; None = as the recipe says."""

    sampler: SamplerName | None
    num_steps: int | None
    guidance: float | None
    guidance_interval: tuple[float, float] | None
    guidance_schedule: GuidanceSchedule | None
    guidance_base_size: float | None
    eta: float | None
    grid: GridName | None
    shift: float | None
    rho: float | None
    times: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Options of sampling from a trained network; times are ours, 0 = data and 1 = noise.

    Raises InputError for options that contradict each other.

    Attributes:
        sampler: Name of the sampler; None follows the objective: euler for flow, ddim for eps, heun for x.
        num_steps: Number of steps of the sampler; of explicit times it is counted.
        guidance: w in pred_c + w (pred_c - pred_u); 0 is off, w = diffusers' guidance_scale - 1.
        guidance_interval: (low, high), the times between which guidance is on. An end belongs to the interval only if
            it is 0 or 1, as in JiT, whose 0.1 to 1 is (0, 0.9) here.
        guidance_schedule: w over t: "constant"; "linear", 2 w (1 - t); "cosine", w (1 + cos(pi t)). All have mean w
            over t (Wang et al. 2024).
        guidance_base_size: Side s0 of the latents that w was chosen at: for latents of height h and width v it becomes
            w sqrt(h v) / s0 (PoM v1), which is w itself and not w + 1, the scale of diffusers. None = w at any size.
        eta: Amount of noise that ddim and sde add in a step; None is 0 for ddim and 1 for sde.
        grid: "uniform", "shift", "rho" or "times"; None follows what is given of the next three, else the shift that
            the model was trained with, else "uniform".
        shift: Factor on sigma / alpha of the uniform grid (Esser et al. 2024, equation 23): s / s0 for sides s and s0.
        rho: Exponent of EDM's grid (Karras et al. 2022, equation 5), from sigma / alpha = 80 to 0.002; 7 by default.
        times: The times themselves, strictly decreasing to 0.
    """

    sampler: SamplerName | None = None
    num_steps: int = 50
    guidance: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_schedule: GuidanceSchedule = "constant"
    guidance_base_size: float | None = None
    eta: float | None = None
    grid: GridName | None = None
    shift: float | None = None
    rho: float | None = None
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        config = self._checked()
        of_config = {name: getattr(config, name) for name in ("guidance_interval", "times")}  # lists become tuples
        if config.times is not None:
            of_config["num_steps"] = len(config.times) - 1
        for name, value in of_config.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_recipe(cls, config: SamplingConfig, **changes: Unpack[SamplingChanges]) -> SamplingOptions:
        """Return the options of a recipe, with `changes`.

        Another sampler than the recipe's does not take over its eta, and a change of the grid replaces all of it.
        """
        asked = {name: value for name, value in changes.items() if value is not None}
        kept = {name: getattr(config, name) for name in SamplingArguments.__annotations__}
        if asked.get("sampler", config.sampler) != config.sampler:
            del kept["eta"]
        if any(name in asked for name in _OF_GRID):
            for name in _OF_GRID:
                del kept[name]
        options = cls(**{**kept, **asked})
        if options.num_steps != asked.get("num_steps", options.num_steps):
            raise InputError(
                f"sampling: {asked['num_steps']} steps are asked for, and the explicit times make {options.num_steps}; "
                "leave one of them out, or choose another grid"
            )
        return options

    def resolved(self, objective: str, shift: float | None = None) -> SamplingOptions:
        """Return the options with all that None stands for.

        Args:
            objective: Objective of the model, "flow", "eps" or "x".
            shift: Shift of the times that training has for samples of this shape, see config.time_shift.

        Raises:
            InputError: The options do not fit the objective.
        """
        config = self._checked().shifted_as(shift)
        try:
            config.check_objective(objective)
        except ValueError as error:
            raise InputError(f"sampling: {error}") from error
        sampler = self.sampler or DEFAULT_SAMPLER[objective]
        rho = DEFAULT_RHO if config.grid_name == "rho" and self.rho is None else self.rho
        eta = DEFAULT_ETA.get(sampler) if self.eta is None else self.eta
        return replace(self, sampler=sampler, eta=eta, grid=config.grid_name, shift=config.shift, rho=rho)

    @property
    def adds_noise(self) -> bool:
        """Whether the sampler, which must be resolved, adds noise in its steps."""
        return self.sampler == "ddpm" or bool(self.eta)

    def settings(self) -> dict[str, Any]:
        """Return the options as JSON, for a result that they lead to; of `resolved` options nothing is left open."""
        values = asdict(self)
        values["steps"] = values.pop("num_steps")
        values["guidance_interval"] = list(self.guidance_interval)
        values["times"] = None if self.times is None else list(self.times)
        return values

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> SamplingOptions:
        """Return the options of `settings`, also of those that an earlier version knew fewer of."""
        values = dict(settings)
        return cls(num_steps=values.pop("steps"), **values)

    def _checked(self) -> SamplingConfig:
        try:
            return SamplingConfig(**asdict(self))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            named = f"{first['loc'][0]}: " if first["loc"] else ""
            raise InputError(f"sampling: {named}{first['msg'].removeprefix('Value error, ')}") from error
