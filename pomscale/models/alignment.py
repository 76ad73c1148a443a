"""Hidden states of a network that are projected to a teacher's features in training."""

from __future__ import annotations

from torch import Tensor

from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.layers import AlignmentProjection


def build_alignment(config: ImageModelConfig | VideoModelConfig) -> AlignmentProjection | None:
    """Build the projection of a network, if its config has one."""
    alignment = config.alignment
    return None if alignment is None else AlignmentProjection(config.dim, alignment.hidden, alignment.dim)


def project(projection: AlignmentProjection | None, hidden: Tensor | None, num_aligned: int) -> Tensor:
    """Project the hidden states (b n d) of the first `num_aligned` samples -> (num_aligned n dim).

    With 0 of them nothing is computed, and the projection's gradients are zeros, which ranks may reduce with those of
    others; engines would treat parameters without a gradient each in its own way.

    Raises:
        ValueError: The network has no projection.
    """
    if projection is None or hidden is None:
        raise ValueError("num_aligned: this network has no projection (model.alignment)")
    return projection(hidden if num_aligned == len(hidden) else hidden[:num_aligned])
