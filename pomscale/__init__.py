"""pomscale: large-scale training of attention-free diffusion models (Polymorphers)."""

from __future__ import annotations

__version__ = "0.1.0"
