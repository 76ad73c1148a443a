"""Parameters and floating-point operations of a network, from its config alone.

FLOPs are 2 per multiply-add of linear maps, convolutions and attention products, as torch.utils.flop_counter counts
them; elementwise work is left out. Per token and block of width d (N tokens, feed-forward expansion f, degree k, PoM
expansion e), in multiply-adds: PoM 3 k e d^2, attention 4 d^2 + 2 N d, whatever its mask, feed-forward 2 f d^2.
Modulation costs 6 d^2 per picture and block.

A block of clips has a cross mixer besides, over M tokens of text: per token PoM 2 k e d^2, attention 2 d^2 + 2 M d, and
per token of text PoM k e d^2, attention 2 d^2. Its modulation costs 11 d^2: with k = e = 2 and f = 4 a PoM block has
12 d^2 (cross) + 12 d^2 (self) + 8 d^2 (feed-forward) + 11 d^2 (modulation) = 43 d^2 parameters, biases aside. The
modulation and the modulated text, of which a clip has one for every t, cost as often as it has values of t.
"""

from __future__ import annotations

from pomscale.config.codecs import TextEncoderConfig
from pomscale.config.model import MixerName, ModelConfig, VideoModelConfig
from pomscale.config.recomputation import is_recomputed

TEXT_LENGTH: int = TextEncoderConfig.model_fields["max_length"].default
"""Default length of a clip's text in tokens: captions are padded to the encoder's max_length."""


def num_parameters(config: ModelConfig) -> int:
    """Return the number of trainable parameters of the network."""
    dim, values = config.dim, _patch_values(config)
    embeddings = _linear(values, dim) + _linear(dim, 4 * dim) + _linear(4 * dim, dim)
    if isinstance(config, VideoModelConfig):
        embeddings += _linear(config.text_dim, dim)
    else:
        embeddings += (config.num_classes + 1) * dim
    head = _linear(dim, 2 * dim) + _linear(dim, values)
    return embeddings + num_block_parameters(config) + head


def num_block_parameters(config: ModelConfig) -> int:
    """Return the number of trainable parameters of all blocks."""
    dim = config.dim
    block = _linear(dim, config.ffn_expansion * dim) + _linear(config.ffn_expansion * dim, dim)
    block += _linear(dim, _num_modulations(config) * dim)
    width = config.degree * config.expand * dim
    mixer: dict[MixerName, int] = {
        "pom": 2 * _linear(dim, width) + _linear(width, dim),
        "attention": _linear(dim, dim) + _linear(dim, 2 * dim) + _linear(dim, dim),
    }
    num_mixers = 2 if isinstance(config, VideoModelConfig) else 1
    return sum(block + num_mixers * mixer[name] for name in config.mixers)


def forward_flops(config: ModelConfig, *, text_length: int = TEXT_LENGTH, num_times: int = 1) -> int:
    """Return the FLOPs of one forward pass of one sample of `config.latent_shape`.

    Args:
        config: network.
        text_length: tokens of text of a clip, padding included.
        num_times: values of t of a clip: one, or one per frame group.
    """
    dim, tokens = config.dim, config.num_tokens
    patches = 2 * tokens * _patch_values(config) * dim  # embedding and head
    of_time = num_times * (8 * dim**2 + 2 * dim**2)  # time embedding, final modulation
    of_text = text_length * config.text_dim * dim if isinstance(config, VideoModelConfig) else 0
    blocks = sum(_block_flops(config, name, text_length, num_times) for name in config.mixers)
    return 2 * (patches + of_time + of_text) + blocks


def training_flops(config: ModelConfig, *, text_length: int = TEXT_LENGTH, num_times: int = 1) -> int:
    """Return the FLOPs of forward and backward of one sample; each forward product costs two in the backward pass.

    Recomputation by activation checkpointing is not counted, as is usual for MFU. Arguments are as of `forward_flops`.
    """
    return 3 * forward_flops(config, text_length=text_length, num_times=num_times)


def recomputed_flops(
    config: ModelConfig, activation_checkpointing: str, *, text_length: int = TEXT_LENGTH, num_times: int = 1
) -> int:
    """Return the FLOPs that one sample's backward pass repeats under a mode of compute.activation_checkpointing.

    "selective" repeats none, since it keeps the outputs of matrix products. Other arguments are as of `forward_flops`.
    """
    mixers = enumerate(config.mixers)
    return sum(
        _block_flops(config, name, text_length, num_times)
        for number, name in mixers
        if is_recomputed(activation_checkpointing, number)
    )


def _block_flops(config: ModelConfig, name: MixerName, text_length: int, num_times: int) -> int:
    dim, tokens = config.dim, config.num_tokens
    width = config.degree * config.expand * dim
    mixer: dict[MixerName, int] = {"pom": 3 * width * dim, "attention": 4 * dim**2 + 2 * tokens * dim}
    of_tokens = tokens * (mixer[name] + 2 * config.ffn_expansion * dim**2)
    of_times = num_times * _num_modulations(config) * dim**2
    if isinstance(config, VideoModelConfig):
        queries: dict[MixerName, int] = {"pom": 2 * width * dim, "attention": 2 * dim**2 + 2 * text_length * dim}
        context: dict[MixerName, int] = {"pom": width * dim, "attention": 2 * dim**2}
        of_tokens += tokens * queries[name]
        of_times += num_times * text_length * context[name]
    return 2 * (of_tokens + of_times)


def _num_modulations(config: ModelConfig) -> int:
    """Return the number of scales, shifts and gates of a block, each of width d."""
    return 8 + 3 if isinstance(config, VideoModelConfig) else 4 + 2


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _patch_values(config: ModelConfig) -> int:
    """Return the count of latent values in one token."""
    num_frames = config.patch_frames if isinstance(config, VideoModelConfig) else 1
    return num_frames * config.patch_size**2 * config.latent_shape[0]
