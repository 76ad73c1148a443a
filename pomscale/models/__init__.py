"""Networks: plain modules that know layers and their config, never how they are sharded, trained or sampled."""

from __future__ import annotations

from typing import Any

from pomscale.config.schema import ModelConfig
from pomscale.models.image import DiPoM
from pomscale.models.init import init_weights, initial_value

__all__ = ["DiPoM", "build_model", "init_weights", "initial_value"]


def build_model(
    preset: str, *, num_classes: int, latent_shape: tuple[int, int, int], seed: int = 0, **changes: Any
) -> DiPoM:
    """A named network with initial weights on the CPU, e.g. build_model("dipom-xl-2", num_classes=1000, ...).

    latent_shape is (channels, height, width); changes are other fields of config.schema.ModelConfig.
    Raises pydantic.ValidationError for a name or a combination that does not exist.
    """
    model = DiPoM(ModelConfig(preset=preset, num_classes=num_classes, latent_shape=latent_shape, **changes))
    init_weights(model, seed)
    return model
