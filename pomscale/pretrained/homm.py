"""`pomscale import`: a Lightning checkpoint of davidpicard/HoMM as a folder that `load_pretrained` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pomscale.codecs import build_codec
from pomscale.config.codecs import SdVaeCodecConfig
from pomscale.config.model import ImageModelConfig
from pomscale.config.sampling import SamplingConfig
from pomscale.config.train import DiffusionConfig
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.homm_checkpoint import check_names, infer_config, read_lightning, translate
from pomscale.pretrained.weights import parameter_shapes, write_weights

# The scaling factor of Stable Diffusion's VAE, which HoMM multiplies its latents by.
_SD_VAE_FACTOR = 0.18215


@dataclass(frozen=True)
class HommImport:
    """What was imported, and what no tensor could tell."""

    model: ImageModelConfig
    sets: tuple[str, ...]
    assumptions: tuple[str, ...]

    def __str__(self) -> str:
        network = "ClassConditionalDiH" if self.model.mixers[0] == "pom" else "ClassConditionalDiT"
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
    """Write the weights of a Lightning checkpoint of davidpicard/HoMM to the new folder `out`, with all that
    `load_pretrained` needs: "ema" where the file has an average, and "model".

    The loaded model at t gives what theirs gives at time 1000 t. The arguments are what the tensors do not tell: the
    polynomial's degree (DiH), the attention heads (DiT; None: those of the published model of that size, or 16), the
    side of the latents, their `mode` ("fm" is flow), and the folder of the VAE, whose weights are then recorded.
    Raises InputError if the file is no checkpoint of these networks, or the arguments do not fit it.
    """
    sets = read_lightning(file)
    model = infer_config(file, sets["model"], degree=degree, num_heads=heads, latent_size=latent_size)
    shapes, mixer = parameter_shapes(model), model.mixers[0]
    for tensors in sets.values():
        check_names(file, tensors, shapes, mixer)
    card = _homm_card(model, objective, codec_path, has_average="ema" in sets)
    provenance = {"imported_from": str(file.resolve()), "code": "davidpicard/HoMM"}
    translated = {name: translate(file, tensors, shapes, mixer) for name, tensors in sorted(sets.items())}
    write_weights(out, card, provenance, shapes, translated)
    return HommImport(model, tuple(translated), _homm_assumptions(card))


def _homm_card(
    model: ImageModelConfig, objective: Literal["eps", "flow"], codec_path: str | None, has_average: bool
) -> ModelCard:
    """Their training: linear schedule or flow, classes dropped in 1 of 10 samples, latents times the VAE's factor."""
    config = SdVaeCodecConfig(name="sd_vae") if codec_path is None else SdVaeCodecConfig(name="sd_vae", path=codec_path)
    codec = None if codec_path is None else build_codec(config)
    factor = _SD_VAE_FACTOR if codec is None else codec.scaling_factor
    channels = model.latent_shape[0]
    return ModelCard(
        model=model,
        diffusion=DiffusionConfig(objective=objective, condition_dropout=0.1),
        sampling=SamplingConfig(),
        codec=config,
        codec_identity=None if codec is None else codec.identity(),
        class_names=(),
        latent_mean=(0.0,) * channels,
        latent_std=(1 / factor,) * channels,
        averages=("ema",) if has_average else (),
    )


def _homm_assumptions(card: ModelCard) -> tuple[str, ...]:
    model = card.model
    side = model.latent_shape[1]
    hidden = (
        f"degree {model.degree} and so expand {model.expand} (--degree)"
        if model.mixers[0] == "pom"
        else f"{model.num_heads} attention heads (--heads)"
    )
    vae = card.codec.path if isinstance(card.codec, SdVaeCodecConfig) else card.codec.name
    identity = "not recorded" if card.codec_identity is None else "recorded"
    return (
        hidden,
        f"latents of {side}x{side} (--latent-size)",
        f"trained to predict {'noise' if card.diffusion.objective == 'eps' else 'velocity'} (--objective)",
        f"VAE {vae}, latents times {1 / card.latent_std[0]:.5g}, its weights {identity} (--codec-path)",
    )
