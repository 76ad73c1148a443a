"""Lightning checkpoints of davidpicard/HoMM: their networks ClassConditionalDiH and ClassConditionalDiT as ours.

Such a file is a pickled dict; in its `state_dict` lie `model.NAME` (as last trained) and `ema.ema_model.NAME` (their
moving average). Their networks compute what ours do, with other names and these differences:

    freqs       frequencies of the time embedding, stored; ours are computed, for 1000 time steps
    mha.qkv     one fused map; ours are `query` (its first third) and `key_value`
    gate_mlp    DiT multiplies by g where we, and DiH, multiply by 1 + g: its bias is lower by 1 here

Facts are those of commit 71f8318 (October 2024). Checkpoints of earlier networks store position embeddings, which those
of today compute; as the forward pass differed as well, they are refused, and so are DiH++ and other networks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.config.model import ImageModelConfig
from pomscale.config.presets import PRESETS

_PREFIXES = {"model.": "model", "ema.ema_model.": "ema"}
_COMPILED = "_orig_mod."  # torch.compile's part of a name
_NUM_TIMESTEPS = 1000

# Ours -> theirs.
_MODULES = {
    "class_embedding": "classes_emb",
    "time_embedding.expand": "time_emb.0",
    "time_embedding.contract": "time_emb.2",
    "patch_embedding.projection": "in_conv",
    "modulation": "out_mod.1",
    "head": "out_proj",
}
_BLOCK_MODULES = {
    "modulation": "cond_mlp.1",
    "gates": "gate_mlp.1",
    "ffn.0": "ffw.0",
    "ffn.2": "ffw.2",
}
_MIXER_MODULES = {
    "pom": {"mixer.projection": "hom.ho_proj", "mixer.gate": "hom.se_proj", "mixer.output": "hom.ag_proj"},
    "attention": {"mixer.query": "mha.qkv", "mixer.key_value": "mha.qkv", "mixer.output": "mha.proj"},
}

# What sizes are read from.
_SIZED = ("in_conv.weight", "classes_emb.weight", "layers.0.ffw.0.weight")
_MIXER_KEYS = {"pom": "layers.0.hom.ho_proj.weight", "attention": "layers.0.mha.qkv.weight"}


class _Ignored:
    """Stands for every object in a checkpoint that is not a tensor or plain data. It does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def read_lightning(file: Path) -> dict[str, dict[str, Tensor]]:
    """The sets of weights of a Lightning checkpoint, "model" and, where there is one, "ema", by their own names.

    Tensors are mapped from the file. Nothing in the file is executed: objects that are not tensors or plain data, such
    as the state of callbacks, come out inert. Raises InputError if the file is no such checkpoint.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        inert: list[Any] = [(type("_Ignored", (_Ignored,), {}), name) for name in names]
        with torch.serialization.safe_globals(inert):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, LookupError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{file}: cannot be read as a checkpoint of torch.save, or not safely: {reason}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    sets: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items() if isinstance(state, Mapping) else ():
        for prefix, name in _PREFIXES.items():
            if isinstance(value, Tensor) and key.startswith(prefix):
                sets.setdefault(name, {})[key.removeprefix(prefix).replace(_COMPILED, "")] = value
    if "model" not in sets:
        raise InputError(f"{file}: has no `state_dict` with tensors model.*; is it a Lightning checkpoint of HoMM?")
    return sets


def infer_config(
    file: Path, tensors: Mapping[str, Tensor], *, degree: int, num_heads: int | None, latent_size: int
) -> ImageModelConfig:
    """Sizes from shapes. Degree, heads (None: those of the published DiT of that size, or 16) and the latents' side are
    in no shape. Raises InputError if the tensors are of another network, or the degree is impossible.
    """
    mixers = [mixer for mixer, key in _MIXER_KEYS.items() if key in tensors]
    if not mixers or not all(name in tensors for name in _SIZED):
        found = ", ".join(sorted(tensors)[:5])
        raise InputError(f"{file}: neither ClassConditionalDiH nor ClassConditionalDiT of HoMM; it begins {found}")
    mixer = mixers[0]
    dim, channels, patch_size, _ = tensors["in_conv.weight"].shape
    depth = 1 + max(int(match[1]) for name in tensors if (match := re.match(r"layers\.(\d+)\.", name)))
    fields: dict[str, Any] = {
        "latent_shape": (channels, latent_size, latent_size),
        "num_classes": tensors["classes_emb.weight"].shape[0] - 1,
        "dim": dim,
        "depth": depth,
        "patch_size": patch_size,
        "ffn_expansion": tensors["layers.0.ffw.0.weight"].shape[0] // dim,
        "mixer": mixer,
    }
    if mixer == "attention":
        fields["num_heads"] = num_heads or _published_heads(dim, depth)
    else:
        width = tensors[_MIXER_KEYS["pom"]].shape[0]
        if degree < 1 or width % (degree * dim):
            raise InputError(f"{file}: --degree {degree} does not divide the mixer's width, {width // dim} x {dim}")
        fields |= {"degree": degree, "expand": width // (degree * dim)}
    try:
        return ImageModelConfig(**fields)
    except ValidationError as error:
        raise InputError(f"{file}: {error.errors()[0]['msg']}") from error


def check_names(file: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], mixer: str) -> None:
    """Raises InputError unless the file has exactly what the network, of our `shapes`, is made of."""
    wanted = {_their_name(name, mixer) for name in shapes} | {"freqs"}
    missing, foreign = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    if missing or foreign:
        parts = [f"{what}: {', '.join(n[:5])}" for what, n in (("lacks", missing), ("has also", foreign)) if n]
        raise InputError(
            f"{file}: another network, or another version of it, than pomscale imports; {'; '.join(parts)}"
        )
    freqs = tensors["freqs"].double()
    expected = _NUM_TIMESTEPS ** (-torch.arange(len(freqs), dtype=torch.float64) / len(freqs))
    if not torch.allclose(freqs, expected, rtol=1e-4):
        raise InputError(
            f"{file}: its time embedding is for {freqs[1] ** -len(freqs):.0f} steps; pomscale's has {_NUM_TIMESTEPS}"
        )


def translate(
    file: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], mixer: str
) -> Iterator[Tensor]:
    """Values, fp32, of our parameters in the order of `shapes`. Raises InputError for one of another shape."""
    for name, shape in shapes.items():
        theirs = _their_name(name, mixer)
        value = _absorb(name, tensors[theirs].float(), mixer)
        if value.shape != torch.Size(shape):
            raise InputError(f"{file}: {theirs} gives {name} the shape {tuple(value.shape)}, expected {tuple(shape)}")
        yield value


def _absorb(name: str, value: Tensor, mixer: str) -> Tensor:
    """What is more than another name: see the top of this file."""
    if mixer != "attention":
        return value
    third = len(value) // 3
    if ".mixer.query." in name:
        return value[:third]
    if ".mixer.key_value." in name:
        return value[third:]
    return value - 1 if name.endswith(".gates.bias") else value


def _their_name(name: str, mixer: str) -> str:
    module, _, leaf = name.rpartition(".")
    if match := re.match(r"trunk\.(\d+)\.(.+)", module):
        return f"layers.{match[1]}.{(_BLOCK_MODULES | _MIXER_MODULES[mixer])[match[2]]}.{leaf}"
    return f"{_MODULES[module]}.{leaf}"


def _published_heads(dim: int, depth: int) -> int:
    for preset in PRESETS.values():
        if preset["mixer"] == "attention" and (preset["dim"], preset["depth"]) == (dim, depth):
            return preset["num_heads"]
    return 16
