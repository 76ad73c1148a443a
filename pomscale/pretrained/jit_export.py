"""`pomscale export --format jitpp`: a JiT as a Lightning checkpoint that davidpicard/JiTpp reads.

The layout is that of `pretrained.jit`: `state_dict` with tables of rotary positions, and two averages as lists in the
order of their parameters, the fixed positions among them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write
from pomscale.config.hardware import Precision
from pomscale.config.mixer import AttentionMixer, Mixer
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.presets import IMAGE_PRESETS
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.jit_weights import is_table, translate_back
from pomscale.pretrained.weights import TrainedWeights, open_weights, parameter_shapes

_PREFIX = "denoiser.net."
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Choices that JiTpp's code has fixed.
_JIT = IMAGE_PRESETS["jit-b-16"]
_CHOICES = ("norm", "gates", "ffn", "ffn_expansion", "positions", "time_embedding")
_LIGHTNING_VERSION = "2.0.0"
"""Version whose layout is written; Lightning asks for it before it reads a file."""


def export_jit(path: Path, out: Path, *, dtype: Precision = "fp32") -> tuple[str, ...]:
    """Write the weights of a run, a checkpoint or an exported folder to the new file `out`, which JiTpp reads.

    The weights as last trained become its `state_dict`, and the first two averages `ema_params1` and `ema_params2`.
    JiTpp needs two: a single average is written as both. A folder that has an average alone gives it as all three.

    Args:
        path: The run folder, checkpoint or exported folder.
        out: The file to make.
        dtype: "fp32" or "bf16".

    Returns:
        The names of the sets that were written.

    Raises:
        InputError: JiTpp has no such network, there are no weights at `path`, or something exists at `out` already.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; give another --out")
    source = open_weights(path)
    reason = _not_theirs(source.card)
    if reason is not None:
        raise InputError(f"{path}: JiTpp has no such network: {reason}")
    averages = [name for name in source.card.averages if name in source.sets][:2]
    main = "model" if "model" in source.sets else averages[0]
    sets = {name: _read(source, name, _DTYPES[dtype]) for name in dict.fromkeys([main, *averages])}
    content: dict[str, Any] = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": _LIGHTNING_VERSION,
        "state_dict": {f"{_PREFIX}{name}": value for name, value in sets[main].items()},
        "hyper_parameters": {"cfg": _settings(source.card)},
    }
    for number in (1, 2) if averages else ():
        average = sets[averages[min(number, len(averages)) - 1]]
        content[f"ema_params{number}"] = [value for name, value in average.items() if not is_table(name)]
    with atomic_write(out) as file:
        torch.save(content, file)
    return tuple(sets)


def _read(source: TrainedWeights, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a set in their order, by their names, tables included."""
    model = source.card.model
    assert isinstance(model, ImageModelConfig)
    tensors = {key: torch.empty(tuple(shape)) for key, shape in parameter_shapes(model).items()}
    source.read(name, tensors)
    theirs = translate_back(tensors, model)
    return {key: value if is_table(key) else value.to(dtype).contiguous() for key, value in theirs.items()}


def _not_theirs(card: ModelCard) -> str | None:
    """Return which choice of a network JiTpp's code does not have; None if it has all."""
    model = card.model
    if model.text_dim is not None:
        return f"it is one of {'clips' if isinstance(model, VideoModelConfig) else 'pictures of a text'}"
    for key in _CHOICES:
        if getattr(model, key) != _JIT[key]:
            return f"model.{key} is {getattr(model, key)}, and theirs {_JIT[key]}"
    channels, height, width = model.latent_shape
    if channels != 3 or height != width:
        return f"model.latent_shape is {channels} x {height} x {width}, and theirs are square pictures of 3 channels"
    if model.patch_embedding.bottleneck is None or model.in_context is None:
        return "model.patch_embedding.bottleneck and model.in_context are what theirs always has"
    if card.diffusion.objective != "x":
        return f"diffusion.objective is {card.diffusion.objective}, and theirs x"
    return _not_their_mixer(model.mixers)


def _not_their_mixer(mixers: list[Mixer]) -> str | None:
    mixer = mixers[0]
    if mixers.count(mixer) < len(mixers):
        return "model.mixer is a hybrid, and theirs has one mixer in all blocks"
    if mixer.rope is None:
        return "model.mixer has no rope, and theirs has"
    if isinstance(mixer, AttentionMixer):
        return None if mixer.qk_norm else "model.mixer has no qk_norm, and theirs has"
    if mixer.groups > 1 or mixer.heads == 1:
        return f"model.mixer has heads {mixer.heads} and groups {mixer.groups}; theirs has heads above 1 and one group"
    return None


def _settings(card: ModelCard) -> dict[str, Any]:
    """Return what of their configuration the card tells, as a record; JiTpp is given its configuration by file."""
    model = card.model
    assert isinstance(model, ImageModelConfig)
    mixer = model.mixers[0]
    sizes = ("dim", "depth", "patch_size", "num_heads")
    arch = next(
        (
            f"JiT-{name.split('-')[1].upper()}/{model.patch_size}"
            for name, preset in IMAGE_PRESETS.items()
            if name.startswith("jit-") and all(preset[key] == getattr(model, key) for key in sizes)
        ),
        None,
    )
    network: dict[str, Any] = {
        "arch": arch,
        "img_size": model.latent_shape[1],
        "attn_dropout": 0.0,
        "proj_dropout": 0.0,
    }
    if isinstance(mixer, AttentionMixer):
        network["mixer"] = "attention"
    else:
        network |= {"mixer": "pom", "pom_degree": mixer.degree, "pom_expand": mixer.expand, "pom_n_groups": 1}
    return {
        "model": network,
        "data": {"num_classes": model.num_classes},
        "diffusion": {"noise_scale": card.diffusion.noise_scale, "t_eps": card.diffusion.clamp},
    }
