"""Names that recipes and the command line share; importing this module needs nothing but the standard library."""

from __future__ import annotations

from typing import Literal

SamplerName = Literal["ddim", "euler", "heun"]
