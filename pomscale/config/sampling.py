"""The part of a training recipe that says how pictures and clips are drawn."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from pomscale.config.names import SamplerName
from pomscale.config.section import Section, Seed


class SamplingConfig(Section):
    """Options for drawing pictures and clips while training; also the defaults of `pomscale sample`."""

    every_samples: PositiveInt | None = Field(None, description="Draw into the run folder this often; null = never.")
    num_classes: PositiveInt | None = Field(None, description="Classes in the grid, from class 0 on; null = up to 8.")
    prompts: list[Annotated[str, Field(min_length=1)]] = Field([], description="Clips: captions of the clips to draw.")
    text_path: str | None = Field(
        None, description="Clips: folder of the text encoder on this machine, if not the one that encoded the captions."
    )
    num_each: PositiveInt = Field(4, description="Pictures of each class, clips of each prompt.")
    num_frames: PositiveInt | None = Field(
        None, description="Clips: latent frames; null = as many as model.latent_shape has."
    )
    sampler: SamplerName | None = Field(None, description="null follows the objective: euler for flow, ddim for eps.")
    num_steps: PositiveInt = 50
    guidance: float = Field(0.0, description="w in pred_c + w (pred_c - pred_u); 0 = off.")
    seed: Seed = 0
