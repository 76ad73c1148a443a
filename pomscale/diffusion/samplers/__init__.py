"""Samplers, one file each. To add one, write a function of the type `Sampler` and enter its name in SAMPLERS."""

from pomscale.config.names import SamplerName
from pomscale.diffusion.samplers.ddim import ddim
from pomscale.diffusion.samplers.euler import euler
from pomscale.diffusion.samplers.heun import heun
from pomscale.diffusion.samplers.types import Sampler

SAMPLERS: dict[SamplerName, Sampler] = {"ddim": ddim, "euler": euler, "heun": heun}
DEFAULT_SAMPLER: dict[str, SamplerName] = {"flow": "euler", "eps": "ddim"}
