"""Parameters of the authors' JiT (davidpicard/JiTpp, `model_jit.py`) by our names.

Their network computes what ours does with the same choices (presets jit-*), apart from the order of things:

    qkv                  one fused map; ours are `query` (its first third) and `key_value`
    heads                rotary positions turn neighbouring channels (2c, 2c + 1) of a head; ours c and c + P
    adaLN_modulation     shift, scale, gate of the mixer, then of the feed-forward; ours are scale and shift, in
                         `modulation`, and the two gates, in `gates`
    proj1                a convolution; ours is a linear map of patches with channels (row, column, c)
    t                    1 for data; our network takes 1 - t in its time embedding
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pomscale.config.mixer import AttentionMixer, Mixer
from pomscale.config.model import ImageModelConfig
from pomscale.layers.official import read_official

# Ours -> theirs, of weights and biases that need no more than another name.
_MODULES = {
    "class_embedding": "y_embedder.embedding_table",
    "time_embedding.expand": "t_embedder.mlp.0",
    "time_embedding.contract": "t_embedder.mlp.2",
    "norm": "final_layer.norm_final",
    "head": "final_layer.linear",
}
_BLOCK_MODULES = {"norm1": "norm1", "norm2": "norm2", "ffn.expand": "mlp.w12", "ffn.contract": "mlp.w3"}
_LEAVES = ("weight", "bias")
# The six parts of a block's adaLN_modulation, in their order.
_SHIFT1, _SCALE1, _GATE1, _SHIFT2, _SCALE2, _GATE2 = range(6)
# Buffers, which their state_dicts have beside the parameters.
_BUFFER = re.compile(r"(^|\.)(freqs|row|col)_(cos|sin)$|^pom_positions")
_POSITIONS = "pos_embed"


def is_buffer(name: str) -> bool:
    """Return whether a tensor of their state_dict is no parameter."""
    return _BUFFER.search(name) is not None


def translate(theirs: Mapping[str, Tensor], config: ImageModelConfig) -> dict[str, Tensor]:
    """Return our parameters.

    Args:
        theirs: Tensors of a `JiT` by name; buffers are ignored, but for those of PoM, which are checked.
        config: Network of the same sizes.

    Raises:
        KeyError: A tensor is missing.
        ValueError: A mixer is another one than the config's.
    """
    ours = {
        f"{name}.{leaf}": theirs[f"{other}.{leaf}"]
        for name, other in _MODULES.items()
        for leaf in _LEAVES
        if f"{other}.{leaf}" in theirs
    }
    ours["patch_embedding.reduce.weight"] = theirs["x_embedder.proj1.weight"].permute(0, 2, 3, 1).flatten(1)
    ours["patch_embedding.expand.weight"] = theirs["x_embedder.proj2.weight"].flatten(1)
    ours["patch_embedding.expand.bias"] = theirs["x_embedder.proj2.bias"]
    if config.in_context is not None:
        ours["in_context.positions"] = theirs["in_context_posemb"][0]
    for leaf in _LEAVES:
        shift, scale = theirs[f"final_layer.adaLN_modulation.1.{leaf}"].chunk(2)
        ours[f"modulation.{leaf}"] = torch.cat([scale, shift])
    for number, mixer in enumerate(config.mixers):
        prefix = f"blocks.{number}."
        block = {name.removeprefix(prefix): value for name, value in theirs.items() if name.startswith(prefix)}
        ours |= {f"trunk.{number}.{name}": value for name, value in _block(block, mixer, config.dim)}
    return ours


def _block(theirs: Mapping[str, Tensor], mixer: Mixer, dim: int) -> Iterator[tuple[str, Tensor]]:
    for leaf in _LEAVES:
        for name, other in _BLOCK_MODULES.items():
            if f"{other}.{leaf}" in theirs:
                yield f"{name}.{leaf}", theirs[f"{other}.{leaf}"]
        parts = theirs[f"adaLN_modulation.1.{leaf}"].chunk(6)
        yield f"modulation.{leaf}", torch.cat([parts[n] for n in (_SCALE1, _SHIFT1, _SCALE2, _SHIFT2)])
        yield f"gates.{leaf}", torch.cat([parts[n] for n in (_GATE1, _GATE2)])
    of_mixer = {name.removeprefix("attn."): value for name, value in theirs.items() if name.startswith("attn.")}
    if isinstance(mixer, AttentionMixer):
        found = _attention(of_mixer, mixer.heads, dim)
    else:
        found = read_official(of_mixer, mixer.degree, mixer.heads, 2).parameters
    for name, value in found.items():
        yield f"mixer.{name}", value


def _attention(theirs: Mapping[str, Tensor], heads: int, dim: int) -> dict[str, Tensor]:
    order = _head_order(dim // heads)
    found = {f"output.{leaf}": theirs[f"proj.{leaf}"] for leaf in _LEAVES}
    for leaf in _LEAVES:
        query, key, value = theirs[f"qkv.{leaf}"].chunk(3)
        query, key = (part.unflatten(0, (heads, -1))[:, order].flatten(0, 1) for part in (query, key))
        found |= {f"query.{leaf}": query, f"key_value.{leaf}": torch.cat([key, value])}
    found["query_norm.weight"], found["key_norm.weight"] = (theirs[f"{n}_norm.weight"][order] for n in ("q", "k"))
    return found


def _head_order(width: int) -> Tensor:
    """Return their channel of a head for each of ours: of each half, the even ones and then the odd ones."""
    return torch.arange(width).view(2, -1, 2).transpose(1, 2).flatten()
