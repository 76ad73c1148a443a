"""`pomscale import`: Lightning checkpoints of davidpicard/HoMM as a folder that `load_pretrained` reads.

Such a file is a pickled dict; in its `state_dict` lie `model.NAME` (as last trained) and `ema.ema_model.NAME` (their
moving average). Their networks ClassConditionalDiH and ClassConditionalDiT compute what ours do, with other names and
these differences:

    freqs       frequencies of the time embedding, stored; ours are computed, for 1000 time steps
    mha.qkv     one fused map; ours are `query` (its first third) and `key_value`
    gate_mlp    DiT multiplies by g where we, and DiH, multiply by 1 + g: its bias is lower by 1 here

The facts are those of commit 71f8318 (October 2024). Checkpoints of earlier networks store position embeddings, which
today's networks compute; since the forward pass differed as well, they are refused, and so are DiH++ and others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.codecs import build_codec
from pomscale.config.codecs import VaeCodecConfig
from pomscale.config.model import ImageModelConfig
from pomscale.config.presets import PRESETS
from pomscale.config.sampling import SamplingConfig
from pomscale.config.train import DiffusionConfig
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.foreign import COMPILED, check_axes, check_numbers, read_foreign
from pomscale.pretrained.weights import parameter_shapes, write_weights
from pomscale.shards.schema import Normalization

# The scaling factor of Stable Diffusion's VAE, which HoMM multiplies its latents by.
_SD_VAE = "stabilityai/sd-vae-ft-ema"
_SD_VAE_FACTOR = 0.18215

_PREFIXES = {"model.": "model", "ema.ema_model.": "ema"}
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

# Tensors from whose shapes the sizes are read, with their numbers of axes.
_SIZED = {"in_conv.weight": 4, "classes_emb.weight": 2, "layers.0.ffw.0.weight": 2}
_MIXER_KEYS = {"pom": "layers.0.hom.ho_proj.weight", "attention": "layers.0.mha.qkv.weight"}


@dataclass(frozen=True)
class HommImport:
    """The imported network, its sets of weights, and the assumptions that no tensor could confirm."""

    model: ImageModelConfig
    sets: tuple[str, ...]
    assumptions: tuple[str, ...]

    def __str__(self) -> str:
        network = "ClassConditionalDiH" if self.model.mixers[0].kind == "pom" else "ClassConditionalDiT"
        sizes = f"dim {self.model.dim}, depth {self.model.depth}, patch {self.model.patch_size}"
        lines = [f"{network}: {sizes}, {self.model.num_classes} classes; weights: {', '.join(self.sets)}"]
        return "\n".join(lines + [f"assumed: {assumption}" for assumption in self.assumptions])


def import_homm(
    file: Path,
    out: Path,
    *,
    degree: int = 2,
    heads: int | None = None,
    latent_size: int = 32,
    objective: Literal["eps", "flow"] = "eps",
    codec_path: str | None = None,
) -> HommImport:
    """Write the weights of a Lightning checkpoint of davidpicard/HoMM to the new folder `out` for `load_pretrained`.

    The folder gets the sets "model" and, if the file has an average, "ema". The loaded model at t gives what theirs
    gives at time 1000 t. The keyword arguments are facts that the tensors do not reveal.

    Args:
        file: The Lightning checkpoint.
        out: The folder to make.
        degree: Degree of the polynomial, for DiH.
        heads: Number of attention heads, for DiT; None = as in the published model of that size, or 16.
        latent_size: Side of the latents.
        objective: "eps", or "flow" for a model that was trained with their mode "fm".
        codec_path: Folder of the VAE; None = the default one, whose weights are not recorded.

    Returns:
        A description of the import.

    Raises:
        InputError: The file is no checkpoint of these networks, or the arguments do not fit it.
    """
    sets = _sets(file, read_foreign(file))
    check_numbers(file, sets)
    model = _infer_config(file, sets["model"], degree=degree, num_heads=heads, latent_size=latent_size)
    shapes, mixer = parameter_shapes(model), model.mixers[0].kind
    for tensors in sets.values():
        _check_names(file, tensors, shapes, mixer)
    card = _homm_card(model, objective, codec_path, has_average="ema" in sets)
    provenance = {"imported_from": str(file.resolve()), "code": "davidpicard/HoMM"}
    translated = {name: _translate(file, tensors, shapes, mixer) for name, tensors in sorted(sets.items())}
    write_weights(out, card, provenance, shapes, translated)
    return HommImport(model, tuple(translated), _homm_assumptions(card))


def _homm_card(
    model: ImageModelConfig, objective: Literal["eps", "flow"], codec_path: str | None, has_average: bool
) -> ModelCard:
    """Return a card of their training: classes dropped in 1 of 10 samples, latents times the VAE's factor."""
    config = VaeCodecConfig(name="vae", path=codec_path or _SD_VAE, store="moments")
    codec = None if codec_path is None else build_codec(config)
    scaling = (0.0, _SD_VAE_FACTOR) if codec is None else (codec.shift, codec.scaling_factor)
    seen = Normalization.by_codec(*scaling, model.latent_shape[0])
    return ModelCard(
        model=model,
        diffusion=DiffusionConfig(objective=objective, condition_dropout=0.1),
        sampling=SamplingConfig(),
        codec=config,
        codec_identity=None if codec is None else codec.identity(),
        class_names=(),
        latent_mean=seen.mean,
        latent_std=seen.std,
        averages=("ema",) if has_average else (),
    )


def _homm_assumptions(card: ModelCard) -> tuple[str, ...]:
    model = card.model
    side = model.latent_shape[1]
    hidden = (
        f"degree {model.degree} and so expand {model.expand} (--degree)"
        if model.mixers[0].kind == "pom"
        else f"{model.num_heads} attention heads (--heads)"
    )
    vae = card.codec.path if isinstance(card.codec, VaeCodecConfig) else card.codec.name
    identity = "not recorded" if card.codec_identity is None else "recorded"
    return (
        hidden,
        f"latents of {side}x{side} (--latent-size)",
        f"trained to predict {'noise' if card.diffusion.objective == 'eps' else 'velocity'} (--objective)",
        f"VAE {vae}, latents times {1 / card.latent_std[0]:.5g}, its weights {identity} (--codec-path)",
    )


def _sets(file: Path, content: Any) -> dict[str, dict[str, Tensor]]:
    """Return the sets of weights of a Lightning checkpoint, "model" and, where there is one, "ema", with their names.

    Raise InputError if the file is no such checkpoint.
    """
    state = content.get("state_dict") if isinstance(content, dict) else None
    sets: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items() if isinstance(state, Mapping) else ():
        for prefix, name in _PREFIXES.items():
            if isinstance(value, Tensor) and str(key).startswith(prefix):
                sets.setdefault(name, {})[str(key).removeprefix(prefix).replace(COMPILED, "")] = value
    if "model" not in sets:
        raise InputError(f"{file}: has no `state_dict` with tensors model.*; is it a Lightning checkpoint of HoMM?")
    return sets


def _infer_config(
    file: Path, tensors: Mapping[str, Tensor], *, degree: int, num_heads: int | None, latent_size: int
) -> ImageModelConfig:
    """Infer the network's sizes from the shapes; degree, heads and the side of the latents are in no shape.

    Raise InputError if the tensors belong to another network, or the degree is impossible.
    """
    mixers = [mixer for mixer, key in _MIXER_KEYS.items() if key in tensors]
    if not mixers or not all(name in tensors for name in _SIZED):
        found = ", ".join(sorted(tensors)[:5])
        raise InputError(f"{file}: neither ClassConditionalDiH nor ClassConditionalDiT of HoMM; it begins {found}")
    mixer = mixers[0]
    check_axes(file, tensors, _SIZED | {_MIXER_KEYS[mixer]: 2, "freqs": 1})
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


def _check_names(file: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], mixer: str) -> None:
    """Raise InputError unless the file has exactly the parameters of the network, whose shapes here are `shapes`."""
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


def _translate(
    file: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], mixer: str
) -> Iterator[Tensor]:
    """Yield the values, fp32, of our parameters in the order of `shapes`. Raise InputError for a wrong shape."""
    for name, shape in shapes.items():
        theirs = _their_name(name, mixer)
        value = _absorb(name, tensors[theirs].float(), mixer)
        if value.shape != torch.Size(shape):
            raise InputError(f"{file}: {theirs} gives {name} the shape {tuple(value.shape)}, expected {tuple(shape)}")
        yield value


def _absorb(name: str, value: Tensor, mixer: str) -> Tensor:
    """Apply the differences between the networks that are listed at the top of this file."""
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
