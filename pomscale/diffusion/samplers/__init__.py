"""Samplers. To add one, write a function of the type `Sampler` and enter its name in SAMPLERS.

A stochastic one also takes `step_noise` and, if its amount of noise can be chosen, `eta`, by keyword.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from pomscale.config.names import SamplerName
from pomscale.diffusion.draws import StepNoise
from pomscale.diffusion.options import SamplingOptions
from pomscale.diffusion.samplers.ddim import ddim, ddpm
from pomscale.diffusion.samplers.euler import euler
from pomscale.diffusion.samplers.heun import heun
from pomscale.diffusion.samplers.midpoint import midpoint
from pomscale.diffusion.samplers.multistep import dpmpp_2m, unipc
from pomscale.diffusion.samplers.sde import sde
from pomscale.diffusion.samplers.types import Sampler

SAMPLERS: dict[SamplerName, Callable[..., Tensor]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "heun": heun,
    "midpoint": midpoint,
    "sde": sde,
    "unipc": unipc,
}


def build_sampler(options: SamplingOptions, step_noise: StepNoise | None) -> Sampler:
    """Return the sampler of resolved options. Raise ValueError if it adds noise and there is none."""
    assert options.sampler is not None, "the options are resolved"
    if not options.adds_noise:
        return SAMPLERS[options.sampler]
    if step_noise is None:
        raise ValueError(f"sampler {options.sampler} adds noise in its steps: give step_noise")
    amount: dict[str, Any] = {} if options.eta is None else {"eta": options.eta}
    return partial(SAMPLERS[options.sampler], step_noise=step_noise, **amount)
