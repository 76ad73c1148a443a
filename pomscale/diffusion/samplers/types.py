"""Types of a denoiser and of a sampler."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pomscale.diffusion.objectives import Objective

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x (b, ...), t (b,)) -> prediction (b, ...)."""

Sampler = Callable[[Objective, Denoiser, Tensor, Tensor], Tensor]
"""(objective, denoiser, noise x (b, ...), times (num_steps + 1,) from noise to 0) -> x0 (b, ...)."""
