"""Options of sampling."""

from __future__ import annotations

from dataclasses import dataclass

from pomscale.config.schema import SamplerName


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Sampler, number of steps and guidance with which latents are sampled.

    Attributes:
        sampler: Name of the sampler; None follows the objective: euler for flow, ddim for eps.
        num_steps: Number of steps of the sampler.
        guidance: w in pred_c + w (pred_c - pred_u); 0 is off, w = diffusers' guidance_scale - 1.
    """

    sampler: SamplerName | None = None
    num_steps: int = 50
    guidance: float = 0.0
