"""Names that recipes and the command line share; importing this module needs nothing but the standard library."""

from __future__ import annotations

from typing import Literal

SamplerName = Literal["ddim", "ddpm", "dpmpp_2m", "euler", "heun", "midpoint", "sde", "unipc"]
GridName = Literal["uniform", "shift", "rho", "times"]
GuidanceSchedule = Literal["constant", "linear", "cosine"]
