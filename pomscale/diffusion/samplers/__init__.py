"""Samplers, one file each. To add one: a function of the shape `Sampler`, and its name in SAMPLERS."""

from pomscale.diffusion.samplers.ddim import ddim
from pomscale.diffusion.samplers.euler import euler
from pomscale.diffusion.samplers.heun import heun
from pomscale.diffusion.samplers.types import Sampler

SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "euler": euler, "heun": heun}
DEFAULT_SAMPLER = {"flow": "euler", "eps": "ddim"}
