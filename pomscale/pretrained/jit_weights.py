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
from pomscale.layers import grid_positions, sincos_positions_2d
from pomscale.layers.official import read_official
from pomscale.ops.pom.rotary import cos_sin

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
_WITHOUT_BIAS = ("norm1", "norm2", "final_layer.norm_final", "y_embedder.embedding_table")
# Their maps that need more.
_RESHAPED = {"x_embedder.proj1.weight", "x_embedder.proj2.weight", "x_embedder.proj2.bias"}
_MODULATION, _LAST_MODULATION = "adaLN_modulation.1", "final_layer.adaLN_modulation.1"
# The six parts of a block's adaLN_modulation, in their order.
_SHIFT1, _SCALE1, _GATE1, _SHIFT2, _SCALE2, _GATE2 = range(6)
_POSITIONS, _IN_CONTEXT = "pos_embed", "in_context_posemb"
# Tables of rotary positions, which their state_dicts have beside the parameters.
_TABLE = re.compile(r"(^|\.)(freqs|row|col)_(cos|sin)$")
_SAME_TABLES = 1e-4


def is_table(name: str) -> bool:
    """Return whether a tensor of their state_dict is no parameter, but a table of rotary positions."""
    return _TABLE.search(name) is not None


def translate(theirs: Mapping[str, Tensor], config: ImageModelConfig) -> dict[str, Tensor]:
    """Return our parameters.

    Args:
        theirs: Tensors of a `JiT` by name. Fixed positions and tables are checked where they are there.
        config: Network of the same sizes.

    Raises:
        ValueError: Tensors are missing, of no use, or those of another network.
    """
    _check_shapes(theirs, config)
    _check_fixed(theirs, config)
    of_blocks: dict[int, dict[str, Tensor]] = {number: {} for number in range(config.depth)}
    others = {}
    for name, value in theirs.items():
        match = re.match(r"blocks\.(\d+)\.(.+)", name)
        if match and int(match[1]) in of_blocks:
            of_blocks[int(match[1])][match[2]] = value
        elif name != _POSITIONS and not is_table(name):
            others[name] = value
    ours = _root(others, with_context=config.in_context is not None)
    for number, mixer in enumerate(config.mixers):
        try:
            parts = dict(_block(of_blocks[number], mixer, config.dim))
        except ValueError as error:
            raise ValueError(f"block {number}: {error}") from error
        ours |= {f"trunk.{number}.{name}": value for name, value in parts.items()}
    return ours


def translate_back(ours: Mapping[str, Tensor], config: ImageModelConfig) -> dict[str, Tensor]:
    """Return the state_dict of their `JiT` in its order, tables included, for a network with its choices.

    Args:
        ours: Our parameters by name.
        config: Our network, of pictures that are squares.
    """
    height, width = (side // config.patch_size for side in config.latent_shape[1:])
    channels, patch = config.latent_shape[0], config.patch_size
    fixed = sincos_positions_2d(height, width, config.dim, torch.device("cpu"), torch.float32, integer=True)
    theirs = {_POSITIONS: fixed[None], _IN_CONTEXT: ours["in_context.positions"][None]}
    theirs |= _renamed_back(ours, _MODULES, ("time_embedding", "class_embedding"))
    reduce = ours["patch_embedding.reduce.weight"].unflatten(1, (patch, patch, channels))
    theirs["x_embedder.proj1.weight"] = reduce.permute(0, 3, 1, 2)
    theirs["x_embedder.proj2.weight"] = ours["patch_embedding.expand.weight"][..., None, None]
    theirs["x_embedder.proj2.bias"] = ours["patch_embedding.expand.bias"]
    theirs |= _tables_of_attention(config)
    for number, mixer in enumerate(config.mixers):
        prefix = f"trunk.{number}."
        block = {name.removeprefix(prefix): value for name, value in ours.items() if name.startswith(prefix)}
        theirs |= {f"blocks.{number}.{name}": value for name, value in _block_back(block, mixer, height).items()}
    theirs |= _renamed_back(ours, _MODULES, ("norm", "head"))
    for leaf in _LEAVES:
        scale, shift = ours[f"modulation.{leaf}"].chunk(2)
        theirs[f"{_LAST_MODULATION}.{leaf}"] = torch.cat([shift, scale])
    return theirs


def _renamed_back(ours: Mapping[str, Tensor], modules: Mapping[str, str], roots: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors of those of `modules` that begin with one of `roots`, by their names."""
    of_roots = sorted(
        (our for our in modules if our.split(".")[0] in roots), key=lambda our: roots.index(our.split(".")[0])
    )
    return {
        f"{modules[our]}.{leaf}": ours[f"{our}.{leaf}"]
        for our in of_roots
        for leaf in (_LEAVES[:1] if modules[our] in _WITHOUT_BIAS else _LEAVES)
    }


def _block_back(ours: Mapping[str, Tensor], mixer: Mixer, side: int) -> dict[str, Tensor]:
    of_mixer = {name.removeprefix("mixer."): value for name, value in ours.items() if name.startswith("mixer.")}
    back = _attention_back(of_mixer, mixer.heads) if isinstance(mixer, AttentionMixer) else _pom_back(of_mixer, side)
    theirs = _renamed_back(ours, _BLOCK_MODULES, ("norm1",))
    theirs |= {f"attn.{name}": value for name, value in back.items()}
    theirs |= _renamed_back(ours, _BLOCK_MODULES, ("norm2", "ffn"))
    for leaf in _LEAVES:
        scale1, shift1, scale2, shift2 = ours[f"modulation.{leaf}"].chunk(4)
        gate1, gate2 = ours[f"gates.{leaf}"].chunk(2)
        theirs[f"{_MODULATION}.{leaf}"] = torch.cat([shift1, scale1, gate1, shift2, scale2, gate2])
    return theirs


def _attention_back(ours: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    order = _head_order(ours["query_norm.weight"].shape[0]).argsort()
    theirs = {f"{n}_norm.weight": ours[f"{name}_norm.weight"][order] for n, name in (("q", "query"), ("k", "key"))}
    for leaf in _LEAVES:
        key, value = ours[f"key_value.{leaf}"].chunk(2)
        query, key = (part.unflatten(0, (heads, -1))[:, order].flatten(0, 1) for part in (ours[f"query.{leaf}"], key))
        theirs[f"qkv.{leaf}"] = torch.cat([query, key, value])
    return theirs | {f"proj.{leaf}": ours[f"output.{leaf}"] for leaf in _LEAVES}


def _pom_back(ours: Mapping[str, Tensor], side: int) -> dict[str, Tensor]:
    theirs = {"se_bias": ours["gate.bias"], "po_coeff": ours["coefficients"]}
    positions = torch.arange(side)[:, None].expand(-1, 2)
    for axis, (cos, sin) in zip(("row", "col"), cos_sin(positions, len(ours["coefficients"]), 2), strict=True):
        theirs |= {f"{axis}_cos": cos, f"{axis}_sin": sin}
    maps = torch.cat([ours["projection.weight"], ours["gate.weight"]])
    return theirs | {"qc_proj.weight": maps, "ag_proj.weight": ours["output.weight"]}


def _tables_of_attention(config: ImageModelConfig) -> dict[str, Tensor]:
    """Return the tables of rotary positions, for the picture's tokens and with those of the class; none for PoM."""
    mixer = config.mixers[0]
    if not isinstance(mixer, AttentionMixer):
        return {}
    height, width = (side // config.patch_size for side in config.latent_shape[1:])
    tables = cos_sin(grid_positions(height, width), config.dim // mixer.heads, 2)
    cos, sin = (torch.cat(parts, dim=-1).repeat_interleave(2, dim=-1) for parts in zip(*tables, strict=True))
    tokens = 0 if config.in_context is None else config.in_context.tokens
    found: dict[str, Tensor] = {}
    for name, table, at_origin in (("freqs_cos", cos, 1.0), ("freqs_sin", sin, 0.0)):
        of_context = torch.full((tokens, table.shape[1]), at_origin)
        found |= {f"feat_rope.{name}": table, f"feat_rope_incontext.{name}": torch.cat([of_context, table])}
    return found


def _root(theirs: Mapping[str, Tensor], *, with_context: bool) -> dict[str, Tensor]:
    own = {*_RESHAPED, *(f"{_LAST_MODULATION}.{leaf}" for leaf in _LEAVES), *([_IN_CONTEXT] if with_context else [])}
    ours = _renamed(theirs, _MODULES, own)
    ours["patch_embedding.reduce.weight"] = theirs["x_embedder.proj1.weight"].permute(0, 2, 3, 1).flatten(1)
    ours["patch_embedding.expand.weight"] = theirs["x_embedder.proj2.weight"].flatten(1)
    ours["patch_embedding.expand.bias"] = theirs["x_embedder.proj2.bias"]
    if with_context:
        ours["in_context.positions"] = theirs[_IN_CONTEXT][0]
    for leaf in _LEAVES:
        shift, scale = theirs[f"{_LAST_MODULATION}.{leaf}"].chunk(2)
        ours[f"modulation.{leaf}"] = torch.cat([scale, shift])
    return ours


def _block(theirs: Mapping[str, Tensor], mixer: Mixer, dim: int) -> Iterator[tuple[str, Tensor]]:
    of_mixer = {name.removeprefix("attn."): value for name, value in theirs.items() if name.startswith("attn.")}
    others = {name: value for name, value in theirs.items() if not name.startswith("attn.")}
    yield from _renamed(others, _BLOCK_MODULES, {f"{_MODULATION}.{leaf}" for leaf in _LEAVES}).items()
    for leaf in _LEAVES:
        parts = theirs[f"{_MODULATION}.{leaf}"].chunk(6)
        yield f"modulation.{leaf}", torch.cat([parts[n] for n in (_SCALE1, _SHIFT1, _SCALE2, _SHIFT2)])
        yield f"gates.{leaf}", torch.cat([parts[n] for n in (_GATE1, _GATE2)])
    if isinstance(mixer, AttentionMixer):
        found = _attention(of_mixer, mixer.heads, dim)
    else:
        found = read_official(of_mixer, mixer.degree, mixer.heads, 2).parameters
    for name, value in found.items():
        yield f"mixer.{name}", value


def _renamed(theirs: Mapping[str, Tensor], modules: Mapping[str, str], others: set[str]) -> dict[str, Tensor]:
    """Return the tensors of `modules` by our names. Raise ValueError unless theirs are these and `others`."""
    names = {
        f"{our}.{leaf}": f"{their}.{leaf}"
        for our, their in modules.items()
        for leaf in (_LEAVES[:1] if their in _WITHOUT_BIAS else _LEAVES)
    }
    _check_names(theirs, {*names.values(), *others})
    return {our: theirs[their] for our, their in names.items()}


def _attention(theirs: Mapping[str, Tensor], heads: int, dim: int) -> dict[str, Tensor]:
    maps = {f"{name}.{leaf}" for name in ("qkv", "proj") for leaf in _LEAVES}
    _check_names(theirs, {*maps, "q_norm.weight", "k_norm.weight"})
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


def _check_names(theirs: Mapping[str, Tensor], expected: set[str]) -> None:
    missing, foreign = sorted(expected - set(theirs)), sorted(set(theirs) - expected)
    parts = [f"{what}: {', '.join(names[:5])}" for what, names in (("lacks", missing), ("has also", foreign)) if names]
    if parts:
        raise ValueError("; ".join(parts))


def _check_shapes(theirs: Mapping[str, Tensor], config: ImageModelConfig) -> None:
    """Raise ValueError for a wrong shape of a tensor that is cut or reordered; `import_jit` checks what becomes of it.

    Tensors of PoM are left to `read_official`, and missing ones to `_check_names`.
    """
    dim, (channels, *_), patch = config.dim, config.latent_shape, config.patch_size
    bottleneck = config.patch_embedding.bottleneck
    expected: dict[str, tuple[int | None, ...]] = {
        "x_embedder.proj1.weight": (bottleneck, channels, patch, patch),
        "x_embedder.proj2.weight": (dim, bottleneck, 1, 1),
        f"{_LAST_MODULATION}.weight": (2 * dim, dim),
        f"{_LAST_MODULATION}.bias": (2 * dim,),
        _IN_CONTEXT: (1, 0 if config.in_context is None else config.in_context.tokens, dim),
    }
    for number, mixer in enumerate(config.mixers):
        of_block = {f"{_MODULATION}.weight": (6 * dim, dim), f"{_MODULATION}.bias": (6 * dim,)}
        if isinstance(mixer, AttentionMixer):
            of_block |= {"attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,)}
            of_block |= {f"attn.{name}_norm.weight": (dim // mixer.heads,) for name in ("q", "k")}
        expected |= {f"blocks.{number}.{name}": shape for name, shape in of_block.items()}
    for name, shape in expected.items():
        if name in theirs and tuple(theirs[name].shape) != shape:
            raise ValueError(f"{name} has the shape {tuple(theirs[name].shape)}, expected {shape}")


def _check_fixed(theirs: Mapping[str, Tensor], config: ImageModelConfig) -> None:
    """Raise ValueError unless the fixed positions, and the tables of attention, hold what ours compute."""
    height, width = (side // config.patch_size for side in config.latent_shape[1:])
    if _POSITIONS in theirs:
        expected = sincos_positions_2d(height, width, config.dim, torch.device("cpu"), torch.float32, integer=True)
        _check_values(theirs, _POSITIONS, expected[None])
    for name, table in _tables_of_attention(config).items():
        if name in theirs:
            _check_values(theirs, name, table)


def _check_values(theirs: Mapping[str, Tensor], name: str, expected: Tensor) -> None:
    found = theirs[name].float()
    # Files in half precision have rounded positions.
    tolerance = max(_SAME_TABLES, torch.finfo(theirs[name].dtype).eps)
    if found.shape != expected.shape or not (found - expected).abs().max() <= tolerance:
        raise ValueError(f"{name}: holds other positions than JiT's for this size, {tuple(found.shape)}")
