"""Layers: modules with weights, which know no models, process groups or sharding."""

from pomscale.layers.attention import Attention, AttentionState
from pomscale.layers.embeddings import (
    TimestepEmbedding,
    grid_positions,
    sincos_positions_2d,
    sincos_positions_3d,
    timestep_features,
)
from pomscale.layers.mlp import FeedForward
from pomscale.layers.modulation import modulate
from pomscale.layers.patchify import (
    ClipPatchEmbedding,
    PatchEmbedding,
    patchify,
    patchify_clips,
    unpatchify,
    unpatchify_clips,
)
from pomscale.layers.pom import GroupedLinear, PoM

__all__ = [
    "Attention",
    "AttentionState",
    "ClipPatchEmbedding",
    "FeedForward",
    "GroupedLinear",
    "PatchEmbedding",
    "PoM",
    "TimestepEmbedding",
    "grid_positions",
    "modulate",
    "patchify",
    "patchify_clips",
    "sincos_positions_2d",
    "sincos_positions_3d",
    "timestep_features",
    "unpatchify",
    "unpatchify_clips",
]
