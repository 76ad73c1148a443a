"""Embeddings that the networks of pictures and of clips build by the same choices of the config."""

from __future__ import annotations

from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.layers import BottleneckPatchEmbedding, DataFractionEmbedding, TimestepEmbedding

_TIME_EMBEDDINGS: dict[str, type[TimestepEmbedding | DataFractionEmbedding]] = {
    "noise_step": TimestepEmbedding,
    "data_fraction": DataFractionEmbedding,
}


def build_time_embedding(config: ImageModelConfig | VideoModelConfig) -> TimestepEmbedding | DataFractionEmbedding:
    """Build the embedding of the time t, 0 = data and 1 = noise."""
    return _TIME_EMBEDDINGS[config.time_embedding](config.dim)


def build_bottleneck(config: ImageModelConfig | VideoModelConfig) -> BottleneckPatchEmbedding | None:
    """Build the patch embedding that has a bottleneck; None for one linear map."""
    bottleneck = config.patch_embedding.bottleneck
    if bottleneck is None:
        return None
    frames = config.patch_frames if isinstance(config, VideoModelConfig) else 1
    patch = (frames, config.patch_size, config.patch_size)
    return BottleneckPatchEmbedding(config.latent_shape[0], config.dim, bottleneck, patch)
