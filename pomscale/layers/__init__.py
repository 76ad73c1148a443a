"""Layers: modules with weights, which know no models, process groups or sharding."""

from pomscale.layers.alignment import AlignmentProjection
from pomscale.layers.attention import Attention, AttentionState
from pomscale.layers.dropout import Dropout
from pomscale.layers.embeddings import (
    DataFractionEmbedding,
    InContextTokens,
    TimestepEmbedding,
    grid_positions,
    sincos_positions_2d,
    sincos_positions_3d,
    timestep_features,
)
from pomscale.layers.mlp import FeedForward, SwiGLU
from pomscale.layers.modulation import modulate
from pomscale.layers.norm import RMSNorm
from pomscale.layers.patchify import (
    BottleneckPatchEmbedding,
    ClipPatchEmbedding,
    PatchEmbedding,
    patchify,
    patchify_clips,
    unpatchify,
    unpatchify_clips,
)
from pomscale.layers.pom import GroupedLinear, PoM
from pomscale.layers.units import Units, gate_units, modulate_units

__all__ = [
    "AlignmentProjection",
    "Attention",
    "AttentionState",
    "BottleneckPatchEmbedding",
    "ClipPatchEmbedding",
    "DataFractionEmbedding",
    "Dropout",
    "FeedForward",
    "GroupedLinear",
    "InContextTokens",
    "PatchEmbedding",
    "PoM",
    "RMSNorm",
    "SwiGLU",
    "TimestepEmbedding",
    "Units",
    "gate_units",
    "grid_positions",
    "modulate",
    "modulate_units",
    "patchify",
    "patchify_clips",
    "sincos_positions_2d",
    "sincos_positions_3d",
    "timestep_features",
    "unpatchify",
    "unpatchify_clips",
]
