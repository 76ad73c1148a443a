"""Options of sampling, with the recipe's defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, Unpack

from pomscale.config.names import SamplerName
from pomscale.config.sampling import SamplingConfig


class SamplingArguments(TypedDict, total=False):
    """Fields of SamplingOptions as keyword arguments."""

    sampler: SamplerName | None
    num_steps: int
    guidance: float


class SamplingChanges(TypedDict, total=False):
    """Options that differ from the recipe's; None = as the recipe says."""

    sampler: SamplerName | None
    num_steps: int | None
    guidance: float | None


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Options of sampling from a trained network.

    Attributes:
        sampler: Name of the sampler; None follows the objective: euler for flow, ddim for eps.
        num_steps: Number of steps of the sampler.
        guidance: w in pred_c + w (pred_c - pred_u); 0 is off, w = diffusers' guidance_scale - 1.
    """

    sampler: SamplerName | None = None
    num_steps: int = 50
    guidance: float = 0.0

    @classmethod
    def from_recipe(cls, config: SamplingConfig, **changes: Unpack[SamplingChanges]) -> SamplingOptions:
        """Return the options of a recipe, with `changes`."""
        guidance = changes.get("guidance")
        return cls(
            sampler=changes.get("sampler") or config.sampler,
            num_steps=changes.get("num_steps") or config.num_steps,
            guidance=config.guidance if guidance is None else guidance,
        )
