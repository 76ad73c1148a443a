"""Trained models for people: load, sample, decode."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from pomscale.card import ModelCard
from pomscale.codecs.base import Codec
from pomscale.config.schema import SamplerName, SdVaeCodecConfig
from pomscale.diffusion.generate import generate
from pomscale.diffusion.objectives import build_objective
from pomscale.distributed.world import resolve_device
from pomscale.errors import InputError
from pomscale.models import DiPoM
from pomscale.weights import open_weights


class PretrainedDiPoM(DiPoM):
    """A DiPoM with its card, so that sampling and decoding know the objective, the normalisation and the codec."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__(card.model)
        self.card = card

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> PretrainedDiPoM:
        """`load_pretrained` under the name that other libraries have taught people to look for."""
        return load_pretrained(path, **options)

    @cached_property
    def codec(self) -> Codec:
        """The codec of the training latents, on the model's device. Raises InputError as ModelCard.load_codec."""
        return self.card.load_codec(self.head.weight.device)


def load_pretrained(
    path: str | Path,
    *,
    weights: str = "ema",
    device: str = "auto",
    codec_path: str | None = None,
) -> PretrainedDiPoM:
    """The model of a run folder (newest complete checkpoint), a checkpoint or an exported folder; fp32, in eval mode.

    weights: "ema" (the average that stands for the model), "model" (as last trained) or the name of an average, such as
    "halflife-500000" or "power-0.05". device: "auto", "cpu" or "cuda". codec_path: where the codec's weights lie on
    this machine, if not where they lay in training.
    Raises InputError if there are no such weights at `path`, or if they are damaged.
    """
    source = open_weights(Path(path))
    card = source.card
    if codec_path is not None and isinstance(card.codec, SdVaeCodecConfig):
        card = card.model_copy(update={"codec": card.codec.model_copy(update={"path": codec_path})})
    with torch.device("meta"):
        model = PretrainedDiPoM(card)
    model.to_empty(device="cpu")
    source.read(source.resolve(weights), {name: p.detach() for name, p in model.named_parameters()})
    return model.requires_grad_(False).eval().to(resolve_device(device))


def sample(
    model: PretrainedDiPoM,
    condition: list[int] | Tensor,
    *,
    seeds: list[int] | range,
    sampler: SamplerName | None = None,
    steps: int = 50,
    guidance: float = 0.0,
    batch: int = 64,
    show_progress: bool = False,
) -> Tensor:
    """Normalised latents (n c h w) fp32 for n class ids and n seeds; the batch size does not change the pictures.

    sampler None follows the model's objective. guidance w: pred_c + w (pred_c - pred_u), 0 is off,
    w = diffusers' guidance_scale - 1. Raises InputError for unknown classes or a wrong number of seeds.
    """
    if not isinstance(model, PretrainedDiPoM):
        raise InputError("sample: this network does not know its objective; use one of pomscale.load_pretrained")
    classes = torch.as_tensor(condition, dtype=torch.int64)
    num_classes = model.config.num_classes
    if len(classes) != len(seeds):
        raise InputError(f"sample: {len(classes)} conditions but {len(seeds)} seeds; give one seed per picture")
    if len(classes) and not (int(classes.min()) >= 0 and int(classes.max()) <= num_classes):
        raise InputError(f"sample: classes must lie in 0..{num_classes - 1} ({num_classes} = no class)")
    device = next(model.parameters()).device
    objective = build_objective(model.card.diffusion)
    parts = []
    for start in track(range(0, len(classes), batch), "sampling", disable=not show_progress, transient=True):
        part = classes[start : start + batch].to(device)
        parts.append(
            generate(
                objective,
                model,
                model.config.latent_shape,
                part,
                model.null_condition(len(part), device),
                list(seeds[start : start + batch]),
                sampler=sampler,
                num_steps=steps,
                guidance=guidance,
            )
        )
    return torch.cat(parts)


def decode(model: PretrainedDiPoM, latents: Tensor) -> Tensor:
    """Pictures (b 3|1 h w) fp32 in [0, 1] from normalised latents, with the codec the model was trained on.

    Raises InputError if the codec found now is not the one that made the training latents.
    """
    return model.codec.decode(model.card.denormalize(latents))
