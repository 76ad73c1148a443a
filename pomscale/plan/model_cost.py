"""Parameters and floating-point operations of a network, from its config alone.

FLOPs are 2 per multiply-add of linear maps, convolutions and attention products, as torch.utils.flop_counter counts
them; elementwise work is left out. Per token and block of width d (N tokens, feed-forward expansion f, degree k, PoM
expansion e), in multiply-adds: PoM 3 k e d^2, attention 4 d^2 + 2 N d, whatever its mask, feed-forward 2 f d^2.
Modulation costs 6 d^2 per picture and block.

PoM in the form of coefficients has e d channels whatever the degree: e d^2 / g of the projection in g groups, e d^2 of
the output map, and e d^2 of a gate per channel or h d of h selection heads. With heads the output map is applied to the
state of a sample or frame and not to each token, y_n = sum_h s_nh (Wo_h H_h), which gives the same numbers: h d per
token and e d^2 per state. These are the executed FLOPs; the nominal ones are those of the equation as it is written.
All figures are executed FLOPs, MFU included, except where they are called nominal: arithmetic that nobody does is no
use of a GPU.

A block of clips, or of pictures of a text, has a cross mixer besides, over M tokens of text: per token PoM 2 k e d^2,
attention 2 d^2 + 2 M d, and per token of text PoM k e d^2, attention 2 d^2. Its modulation costs 11 d^2: with k = e = 2
and f = 4 a PoM block has 12 d^2 (cross) + 12 d^2 (self) + 8 d^2 (feed-forward) + 11 d^2 (modulation) = 43 d^2
parameters, biases aside. The modulation and the modulated text, of which a clip has one for every t, cost as often as
it has values of t.

Other choices of the trunk: SwiGLU has 3 h d for its width h = 2/3 f d; a bottleneck b of the patch embedding
b (values + d) per token; the time embedding of JiT (256 + d) d per time. In-context tokens, of a class or of a text,
add to N from their block on. The projection of the alignment loss, of hidden width h to features of width z, has
h (d + h + z) per token of the picture, in training alone.
"""

from __future__ import annotations

from pomscale.config.mixer import AttentionMixer, Mixer, PomMixer
from pomscale.config.model import ImageModelConfig, ModelConfig, VideoModelConfig
from pomscale.config.recomputation import is_recomputed
from pomscale.config.text import T5_MAX_LENGTH

TEXT_LENGTH = T5_MAX_LENGTH
"""Default length of a text in tokens: captions are padded to the encoder's max_length."""


_TIME_FEATURES = 256
"""Features of time of layers.DataFractionEmbedding."""


def time_widths(config: ModelConfig) -> tuple[int, int]:
    """Return the number of features of a time, and the hidden width of their embedding."""
    return (_TIME_FEATURES, config.dim) if config.time_embedding == "data_fraction" else (config.dim, 4 * config.dim)


def num_parameters(config: ModelConfig) -> int:
    """Return the number of trainable parameters of the network."""
    dim, values = config.dim, _patch_values(config)
    bottleneck, (features, hidden) = config.patch_embedding.bottleneck, time_widths(config)
    embeddings = _linear(values, dim) if bottleneck is None else values * bottleneck + _linear(bottleneck, dim)
    embeddings += _linear(features, hidden) + _linear(hidden, dim)
    if config.text_dim is not None:
        embeddings += _linear(config.text_dim, dim)
    elif isinstance(config, ImageModelConfig) and config.num_classes is not None:
        embeddings += (config.num_classes + 1) * dim
    if config.in_context is not None:
        embeddings += config.in_context.tokens * dim
    head = _linear(dim, 2 * dim) + _linear(dim, values) + _norm(config)
    return embeddings + num_block_parameters(config) + head + _projection_parameters(config)


def _projection_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of the projection of the alignment loss."""
    alignment = config.alignment
    if alignment is None:
        return 0
    hidden = alignment.hidden
    return _linear(config.dim, hidden) + _linear(hidden, hidden) + _linear(hidden, alignment.dim)


def projection_flops(config: ModelConfig) -> int:
    """Return the FLOPs of projecting the hidden states of one sample for the alignment loss, forward."""
    alignment = config.alignment
    if alignment is None:
        return 0
    return 2 * config.num_tokens * alignment.hidden * (config.dim + alignment.hidden + alignment.dim)


def num_block_parameters(config: ModelConfig) -> int:
    """Return the number of trainable parameters of all blocks."""
    dim, width = config.dim, config.block.ffn_width
    block = _linear(dim, _num_inputs(config) * width) + _linear(width, dim)
    block += _linear(dim, _num_modulations(config) * dim)
    num_mixers = 2 if config.has_cross_mixers else 1
    block += 2 * num_mixers * _norm(config)
    return sum(block + num_mixers * _mixer_parameters(mixer, dim) for mixer in config.mixers)


def _num_inputs(config: ModelConfig) -> int:
    """Return the number of feed-forward widths that the first map makes."""
    return 2 if config.ffn == "swiglu" else 1


def _norm(config: ModelConfig) -> int:
    """Return the number of parameters of a norm."""
    return config.dim if config.norm == "rms" else 0


def _mixer_parameters(mixer: Mixer, dim: int) -> int:
    if isinstance(mixer, AttentionMixer):
        norms = 2 * (dim // mixer.heads) if mixer.qk_norm else 0
        return _linear(dim, dim) + _linear(dim, 2 * dim) + _linear(dim, dim) + norms
    width = mixer.width(dim)
    if mixer.form == "product":
        return 2 * _linear(dim, width) + _linear(width, dim)
    projection = width * dim // mixer.groups
    return projection + _linear(dim, mixer.num_gates(dim)) + width * dim + width * mixer.degree


def forward_flops(
    config: ModelConfig, *, text_length: int = TEXT_LENGTH, num_times: int = 1, nominal: bool = False
) -> int:
    """Return the FLOPs of one forward pass of one sample of `config.latent_shape`.

    Args:
        config: network.
        text_length: tokens of a text, padding included.
        num_times: values of t of a clip: one, or one per frame group.
        nominal: count the output maps of selection heads token by token.
    """
    dim, tokens = config.dim, config.num_tokens
    values, bottleneck, (features, hidden) = (
        _patch_values(config),
        config.patch_embedding.bottleneck,
        time_widths(config),
    )
    patches = tokens * values * dim  # head
    patches += tokens * (values * dim if bottleneck is None else bottleneck * (values + dim))
    of_time = num_times * (hidden * (features + dim) + 2 * dim**2)  # time embedding, final modulation
    of_text = 0 if config.text_dim is None else text_length * config.text_dim * dim
    blocks = sum(_block_flops(config, n, text_length, num_times, nominal) for n in range(config.depth))
    return 2 * (patches + of_time + of_text) + blocks


def training_flops(config: ModelConfig, *, text_length: int = TEXT_LENGTH, num_times: int = 1) -> int:
    """Return the FLOPs of forward and backward of one sample; each forward product costs two in the backward pass.

    The projection of the alignment loss is included. Recomputation by activation checkpointing is not counted, as is
    usual for MFU. Arguments are as of `forward_flops`.
    """
    return 3 * (forward_flops(config, text_length=text_length, num_times=num_times) + projection_flops(config))


def recomputed_flops(
    config: ModelConfig,
    activation_checkpointing: str,
    *,
    lean: bool = False,
    text_length: int = TEXT_LENGTH,
    num_times: int = 1,
) -> int:
    """Return the FLOPs that one sample's backward pass repeats.

    Args:
        config: network.
        activation_checkpointing: mode; "selective" repeats none, since it keeps the outputs of matrix products.
        lean: whether PoM mixers keep their inputs alone (compute.mixer_memory), and repeat their first maps.
        text_length: as of `forward_flops`.
        num_times: as of `forward_flops`.
    """
    blocks = sum(
        _block_flops(config, number, text_length, num_times)
        for number in range(config.depth)
        if is_recomputed(activation_checkpointing, number)
    )
    return blocks + (sum(_lean_flops(config, n, num_times * text_length) for n in range(config.depth)) if lean else 0)


def _block_flops(config: ModelConfig, number: int, text_length: int, num_times: int, nominal: bool = False) -> int:
    dim, tokens, mixer = config.dim, config.num_block_tokens(number, text_length), config.mixers[number]
    states = 1
    if isinstance(config, VideoModelConfig) and config.temporal == "block_causal":
        states = config.num_groups
    products = tokens * (_num_inputs(config) + 1) * config.block.ffn_width * dim
    products += num_times * _num_modulations(config) * dim**2
    if config.has_cross_mixers:
        # Frame groups with a t of their own read the text one by one.
        products += num_times * _mixer_products(mixer, dim, tokens // num_times, text_length, 1, nominal)
    return 2 * (products + _mixer_products(mixer, dim, tokens, tokens, states, nominal))


def _lean_flops(config: ModelConfig, number: int, text_length: int) -> int:
    """Return the FLOPs of the maps that the PoM mixers of a block repeat if they keep their inputs alone."""
    mixer, tokens = config.mixers[number], config.num_block_tokens(number, text_length)
    if isinstance(mixer, AttentionMixer) or mixer.groups > 1:  # groups run in layers, which keep what they give
        return 0
    contexts = [tokens, *([text_length] if config.has_cross_mixers else [])]
    return 2 * sum(_input_products(mixer, config.dim, tokens, context) for context in contexts)


def _input_products(mixer: PomMixer, dim: int, queries: int, context: int) -> int:
    """Return the multiply-adds of the maps to the features of the context and to the gates of the queries."""
    return context * mixer.width(dim) * dim // mixer.groups + queries * mixer.num_gates(dim) * dim


def _mixer_products(mixer: Mixer, dim: int, queries: int, context: int, states: int, nominal: bool) -> int:
    """Return the multiply-adds by which queries read `context` tokens, through so many states."""
    if isinstance(mixer, AttentionMixer):
        return queries * (2 * dim**2 + 2 * context * dim) + context * 2 * dim**2
    width = mixer.width(dim)
    inputs = _input_products(mixer, dim, queries, context)
    if nominal or not mixer.folds(queries // states):
        return inputs + queries * width * dim
    return inputs + states * width * dim + queries * mixer.heads * dim


def _num_modulations(config: ModelConfig) -> int:
    """Return the number of scales, shifts and gates of a block, each of width d."""
    return 8 + 3 if config.has_cross_mixers else 4 + 2


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _patch_values(config: ModelConfig) -> int:
    """Return the count of latent values in one token."""
    num_frames = config.patch_frames if isinstance(config, VideoModelConfig) else 1
    return num_frames * config.patch_size**2 * config.latent_shape[0]
