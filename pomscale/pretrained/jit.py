"""`pomscale import`: checkpoints of JiT as a folder that `load_pretrained` reads.

They come in two layouts. Lightning's, of davidpicard/JiTpp: tensors `denoiser.net.NAME` in `state_dict`, and two
averages as lists, `ema_params1` and `ema_params2`, in the order of the parameters, whose names are recovered from the
order of `state_dict`. And that of the original JiT (LTH14/JiT): `model`, `model_ema1` and `model_ema2` by name.

The facts are those of JiTpp's commit 778056c (April 2026). Before it, PoM turned its inputs, and not its features, by
their positions (tensors `attn.pom.NAME`); that is another network, which today's JiTpp does not load either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.codecs import build_codec
from pomscale.config.codecs import Uint8CodecConfig
from pomscale.config.model import ImageModelConfig
from pomscale.config.presets import IMAGE_PRESETS
from pomscale.config.sampling import SamplingConfig
from pomscale.config.train import DiffusionConfig, TimeConfig
from pomscale.layers.official import read_official
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.foreign import COMPILED, check_axes, check_numbers, read_foreign
from pomscale.pretrained.jit_weights import is_table, translate
from pomscale.pretrained.weights import parameter_shapes, write_weights
from pomscale.shards.schema import Normalization

_LIGHTNING, _ORIGINAL = "denoiser.net.", "net."
_AVERAGES = {"ema1": "1", "ema2": "2"}
_JIT = {name: preset for name, preset in IMAGE_PRESETS.items() if name.startswith("jit-") and "text" not in preset}
# Tensors from whose shapes the sizes are read, with their numbers of axes.
_SIZED = {
    "x_embedder.proj1.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "pos_embed": 3,
    "blocks.0.mlp.w3.weight": 2,
}
# The same of tensors that not every network has.
_ALSO_SIZED = {"in_context_posemb": 3, "blocks.0.attn.q_norm.weight": 1}
# In JiT the noise grows with the side of the pictures.
_SIDE_OF_NOISE_1 = 256


@dataclass(frozen=True)
class JitImport:
    """The imported network, its sets of weights, and the assumptions that no tensor could confirm."""

    model: ImageModelConfig
    sets: tuple[str, ...]
    assumptions: tuple[str, ...]

    def __str__(self) -> str:
        model, side = self.model, self.model.latent_shape[1]
        sizes = f"dim {model.dim}, depth {model.depth}, patch {model.patch_size}, {side}x{side} pixels"
        mixer = "attention" if model.mixers[0].kind == "attention" else "PoM"
        lines = [f"JiT with {mixer}: {sizes}, {model.num_classes} classes; weights: {', '.join(self.sets)}"]
        return "\n".join(lines + [f"assumed: {assumption}" for assumption in self.assumptions])


def is_jit(file: Path) -> bool:
    """Return whether a file is a checkpoint of JiT, in either layout. Raise InputError if it cannot be read safely."""
    return _layout(read_foreign(file)) is not None


def import_jit(
    file: Path, out: Path, *, in_context_start: int | None = None, noise_scale: float | None = None
) -> JitImport:
    """Write the weights of a checkpoint of JiT to the new folder `out` for `load_pretrained`.

    The folder gets the sets "model" and, if the file has them, "ema1" and "ema2", of which the first stands for the
    model. The loaded model at t gives what theirs gives at 1 - t.

    Args:
        file: The checkpoint.
        out: The folder to make.
        in_context_start: Block that first reads the tokens in context; None = that of the preset of these sizes.
        noise_scale: Standard deviation of the noise of training; None = that of JiT for pictures of this size.

    Raises:
        InputError: The file is no checkpoint of this network, or the arguments do not fit it.
    """
    if noise_scale is not None and noise_scale <= 0:
        raise InputError(f"--noise-scale: must be above 0, got {noise_scale:g}")
    sets = _sets(file, read_foreign(file))
    check_numbers(file, sets)
    model = _infer_config(file, sets["model"], in_context_start)
    shapes = parameter_shapes(model)
    translated = {name: list(_translated(file, name, sets[name], model, shapes)) for name in sorted(sets)}
    noise_scale = max(1.0, model.latent_shape[1] / _SIDE_OF_NOISE_1) if noise_scale is None else noise_scale
    averages = tuple(name for name in _AVERAGES if name in sets)
    provenance = {"imported_from": str(file.resolve()), "code": "davidpicard/JiTpp"}
    write_weights(out, _card(model, noise_scale, averages), provenance, shapes, translated)
    start = "none" if model.in_context is None else f"block {model.in_context.start} (--in-context-start)"
    assumptions = (
        f"tokens in context from {start}",
        f"trained with noise of standard deviation {noise_scale:g} (--noise-scale), t = sigmoid(N(0.8, 0.8))",
    )
    return JitImport(model, tuple(translated), assumptions)


def _layout(content: Any) -> str | None:
    """Return the prefix of the tensors' names; None for other files."""
    for key, prefix in (("state_dict", _LIGHTNING), ("model", _ORIGINAL)):
        state = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(state, Mapping) and any(_plain(name).startswith(prefix) for name in state):
            return prefix
    return None


def _sets(file: Path, content: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Return the sets of weights, with their own names. Raise InputError for averages that do not fit."""
    if _layout(content) == _ORIGINAL:
        keys = {"model": "model", **{name: f"model_ema{number}" for name, number in _AVERAGES.items()}}
        return {name: _named(content[key], _ORIGINAL) for name, key in keys.items() if key in content}
    model = _named(content["state_dict"], _LIGHTNING)
    lists = {name: content.get(f"ema_params{number}") for name, number in _AVERAGES.items()}
    return {
        "model": model,
        **{name: _by_position(file, name, model, values) for name, values in lists.items() if values is not None},
    }


def _named(state: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    return {
        _plain(name).removeprefix(prefix): value
        for name, value in state.items()
        if isinstance(value, Tensor) and _plain(name).startswith(prefix)
    }


def _plain(name: Any) -> str:
    """Return the name of a tensor as it is without torch.compile."""
    return str(name).replace(COMPILED, "")


def _by_position(file: Path, name: str, model: Mapping[str, Tensor], values: Any) -> dict[str, Tensor]:
    """Return an average, a list in the order of the parameters, by name."""
    names = [name for name in model if not is_table(name)]
    number = _AVERAGES[name]
    if not isinstance(values, list) or len(values) != len(names):
        found = len(values) if isinstance(values, list) else type(values).__name__
        raise InputError(
            f"{file}: ema_params{number} holds {found} tensors, and the network has {len(names)}; averages are kept by "
            "position, so they cannot be told apart"
        )
    for position, (wanted, value) in enumerate(zip(names, values, strict=True)):
        if not isinstance(value, Tensor) or value.shape != model[wanted].shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"{file}: number {position} of ema_params{number} has the shape {shape}, and {wanted}, which has this "
                f"position, {tuple(model[wanted].shape)}; averages are kept by position, so they cannot be told apart"
            )
    return dict(zip(names, values, strict=True))


def _infer_config(file: Path, tensors: Mapping[str, Tensor], start: int | None) -> ImageModelConfig:
    """Infer the network's sizes from the shapes. Raise InputError if the tensors belong to another network."""
    if any(".attn.pom." in name for name in tensors):
        raise InputError(
            f"{file}: its PoM is JiTpp's before April 2026, which turned its inputs by their positions; that is "
            "another network, which neither today's JiTpp nor pomscale has"
        )
    missing = [name for name in _SIZED if name not in tensors]
    if missing:
        raise InputError(f"{file}: another network than pomscale imports; it lacks: {', '.join(missing)}")
    check_axes(file, tensors, _SIZED | _ALSO_SIZED)
    bottleneck, channels, patch_size, _ = tensors["x_embedder.proj1.weight"].shape
    rows, dim = tensors["y_embedder.embedding_table.weight"].shape
    depth = 1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name)))
    side = patch_size * math.isqrt(tensors["pos_embed"].shape[1])
    fields: dict[str, Any] = {
        **next(iter(_JIT.values())),
        "latent_shape": (channels, side, side),
        "num_classes": rows - 1,
        "dim": dim,
        "depth": depth,
        "patch_size": patch_size,
        "ffn_expansion": round(tensors["blocks.0.mlp.w3.weight"].shape[1] * 3 / 2 / dim),
        "patch_embedding": {"bottleneck": bottleneck},
        "in_context": _in_context(file, tensors, dim, depth, start),
    }
    try:
        return ImageModelConfig.model_validate(fields | _mixer(tensors, dim))
    except ValidationError as error:
        raise InputError(f"{file}: {error.errors()[0]['msg']}") from error
    except ValueError as error:
        raise InputError(f"{file}: block 0: {error}") from error


def _mixer(tensors: Mapping[str, Tensor], dim: int) -> dict[str, Any]:
    """Return the mixer and, for attention, the number of heads. Raise ValueError for neither of JiT's."""
    own = {name.removeprefix("blocks.0.attn."): t for name, t in tensors.items() if name.startswith("blocks.0.attn.")}
    if "qkv.weight" in own or "q_norm.weight" in own:
        if "q_norm.weight" not in own:
            raise ValueError("lacks: attn.q_norm.weight")
        heads = dim // len(own["q_norm.weight"])
        return {"mixer": {"kind": "attention", "qk_norm": True, "rope": True}, "num_heads": heads}
    found = read_official(own, None, None, 2)
    table = {"degree": found.form.degree, "expand": found.expand, "heads": found.form.heads, "groups": found.groups}
    return {"mixer": {"kind": "pom", "form": "coefficients", "rope": True, **table}, "num_heads": found.form.heads}


def _in_context(
    file: Path, tensors: Mapping[str, Tensor], dim: int, depth: int, start: int | None
) -> dict[str, int] | None:
    if "in_context_posemb" not in tensors:
        if start is not None:
            raise InputError(f"--in-context-start: the network in {file} has no tokens in context")
        return None
    if start is None:
        starts = [p["in_context"]["start"] for p in _JIT.values() if (p["dim"], p["depth"]) == (dim, depth)]
        if not starts:
            raise InputError(
                f"{file}: width {dim} and depth {depth} are those of no preset; give the block that first reads the "
                "tokens in context, which no tensor tells: --in-context-start"
            )
        start = starts[0]
    return {"tokens": tensors["in_context_posemb"].shape[1], "start": start}


def _card(model: ImageModelConfig, noise_scale: float, averages: tuple[str, ...]) -> ModelCard:
    """Return a card of their training, on pixels in [-1, 1]. Their time counts from noise to data, ours from data."""
    codec = build_codec(Uint8CodecConfig(name="uint8"))
    seen = Normalization.by_codec(codec.shift, codec.scaling_factor, model.latent_shape[0])
    time = TimeConfig(distribution="logit_normal", mean=0.8, std=0.8)
    return ModelCard(
        model=model,
        diffusion=DiffusionConfig(objective="x", noise_scale=noise_scale, time=time, condition_dropout=0.1),
        sampling=SamplingConfig(),
        codec=codec.config,
        codec_identity=codec.identity(),
        class_names=(),
        latent_mean=seen.mean,
        latent_std=seen.std,
        averages=averages,
    )


def _translated(
    file: Path, name: str, theirs: Mapping[str, Tensor], model: ImageModelConfig, shapes: Mapping[str, torch.Size]
) -> Iterator[Tensor]:
    """Yield our parameters, fp32, in the order of `shapes`."""
    try:
        ours = translate(theirs, model)
    except ValueError as error:
        raise InputError(f"{file}: {name}: {error}") from error
    for key, shape in shapes.items():
        if key not in ours or ours[key].shape != shape:
            found = tuple(ours[key].shape) if key in ours else "none"
            raise InputError(f"{file}: {name}: gives {key} the shape {found}, expected {tuple(shape)}")
        yield ours[key].float()
