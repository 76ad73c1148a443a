"""Layers: modules with weights, ignorant of models, process groups and sharding."""

from pomscale.layers.attention import Attention, AttentionState
from pomscale.layers.embeddings import TimestepEmbedding, sincos_positions_2d, timestep_features
from pomscale.layers.mlp import FeedForward
from pomscale.layers.modulation import modulate
from pomscale.layers.patchify import PatchEmbedding, unpatchify
from pomscale.layers.pom import PoM

__all__ = [
    "Attention",
    "AttentionState",
    "FeedForward",
    "PatchEmbedding",
    "PoM",
    "TimestepEmbedding",
    "modulate",
    "sincos_positions_2d",
    "timestep_features",
    "unpatchify",
]
