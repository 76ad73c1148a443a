"""Parameters and floating-point operations of a network, from its config alone.

FLOPs are 2 per multiply-add of linear maps, convolutions and attention products, as torch.utils.flop_counter counts
them; elementwise work is left out. Per token and block of width d (N tokens, feed-forward expansion f, degree k, PoM
expansion e), in multiply-adds: PoM 3 k e d^2, attention 4 d^2 + 2 N d, feed-forward 2 f d^2. Modulation costs 6 d^2 per
picture and block.
"""

from __future__ import annotations

from pomscale.config.recomputation import is_recomputed
from pomscale.config.schema import MixerName, ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """Trainable parameters of the network."""
    dim, pixels = config.dim, _patch_values(config)
    embeddings = _linear(pixels, dim) + _linear(dim, 4 * dim) + _linear(4 * dim, dim) + (config.num_classes + 1) * dim
    head = _linear(dim, 2 * dim) + _linear(dim, pixels)
    return embeddings + num_block_parameters(config) + head


def num_block_parameters(config: ModelConfig) -> int:
    """Those of all blocks."""
    dim = config.dim
    block = _linear(dim, config.ffn_expansion * dim) + _linear(config.ffn_expansion * dim, dim)
    block += _linear(dim, 4 * dim) + _linear(dim, 2 * dim)
    width = config.degree * config.expand * dim
    mixer: dict[MixerName, int] = {
        "pom": 2 * _linear(dim, width) + _linear(width, dim),
        "attention": _linear(dim, dim) + _linear(dim, 2 * dim) + _linear(dim, dim),
    }
    return sum(block + mixer[name] for name in config.mixers)


def forward_flops(config: ModelConfig) -> int:
    """FLOPs of one forward pass of one sample of `config.latent_shape`."""
    dim, tokens = config.dim, config.num_tokens
    patches = 2 * tokens * _patch_values(config) * dim  # embedding and head
    per_sample = 8 * dim**2 + 2 * dim**2  # time embedding, final modulation
    return 2 * (patches + per_sample) + sum(_block_flops(config, name) for name in config.mixers)


def training_flops(config: ModelConfig) -> int:
    """FLOPs of forward and backward of one sample: the backward pass multiplies twice for each forward product.

    Recomputation by activation checkpointing is not counted, as is usual for MFU.
    """
    return 3 * forward_flops(config)


def recomputed_flops(config: ModelConfig, activation_checkpointing: str) -> int:
    """FLOPs that one sample's backward pass repeats, by mode of ComputeConfig.activation_checkpointing.

    "selective" repeats none: it keeps what matrix products give.
    """
    mixers = enumerate(config.mixers)
    return sum(_block_flops(config, name) for i, name in mixers if is_recomputed(activation_checkpointing, i))


def _block_flops(config: ModelConfig, name: MixerName) -> int:
    dim, tokens = config.dim, config.num_tokens
    mixer: dict[MixerName, int] = {
        "pom": 3 * config.degree * config.expand * dim**2,
        "attention": 4 * dim**2 + 2 * tokens * dim,
    }
    modulation = 6 * dim**2  # once per sample
    return 2 * (tokens * (mixer[name] + 2 * config.ffn_expansion * dim**2) + modulation)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _patch_values(config: ModelConfig) -> int:
    return config.patch_size**2 * config.latent_shape[0]
