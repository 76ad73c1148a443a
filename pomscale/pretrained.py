"""Trained models for people: load, sample, decode."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from rich.progress import track
from torch import Tensor

from pomscale.checkpoint.store import find_checkpoint, read_meta, read_tensors
from pomscale.codecs import build_codec
from pomscale.codecs.base import Codec
from pomscale.config.schema import SamplerName, TrainRecipe
from pomscale.data.schema import CodecInfo, Manifest, Normalization
from pomscale.diffusion.generate import generate
from pomscale.diffusion.objectives import build_objective
from pomscale.distributed.world import resolve_device
from pomscale.errors import InputError
from pomscale.models import DiPoM


class ModelCard(BaseModel):
    """What must travel with weights to use them: stored in every checkpoint, attached to every loaded model."""

    model_config = ConfigDict(frozen=True)

    recipe: TrainRecipe
    codec: CodecInfo
    class_names: tuple[str, ...]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    data_fingerprint: str

    @classmethod
    def of(cls, recipe: TrainRecipe, manifest: Manifest, normalization: Normalization) -> ModelCard:
        return cls(
            recipe=recipe,
            codec=manifest.codec,
            class_names=manifest.class_names,
            latent_mean=normalization.mean,
            latent_std=normalization.std,
            data_fingerprint=manifest.fingerprint,
        )

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalised latents (b c h w), as the network sees them -> unscaled latents, as the codec decodes them."""
        mean, std = (latents.new_tensor(v)[:, None, None] for v in (self.latent_mean, self.latent_std))
        return latents * std + mean

    def load_codec(self, device: torch.device) -> Codec:
        """The codec of the training latents. Raises InputError if the weights found now are not those."""
        codec = build_codec(self.recipe.codec).to(device)
        if codec.identity() != self.codec.identity:
            raise InputError(
                f"codec {codec.name}: its weights are not those that made the training latents; "
                "pictures would come out wrong. Point the recipe's codec.path to the right weights"
            )
        return codec


class PretrainedDiPoM(DiPoM):
    """A DiPoM with its card, so that sampling and decoding know the objective, the normalisation and the codec."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__(card.recipe.model)
        self.card = card


def load_pretrained(
    path: str | Path, *, weights: Literal["ema", "model"] = "ema", device: str = "auto"
) -> PretrainedDiPoM:
    """The model of a run folder (newest complete checkpoint) or of one checkpoint folder; fp32, in eval mode.

    weights: "ema" (the moving average) or "model" (as last trained). device: "auto", "cpu" or "cuda".
    Raises InputError if there is no complete checkpoint at `path`.
    """
    folder = find_checkpoint(Path(path))
    with torch.device("meta"):
        model = PretrainedDiPoM(ModelCard.model_validate(read_meta(folder)["card"]))
    model.to_empty(device="cpu")
    read_tensors(folder, {weights: {name: p.detach() for name, p in model.named_parameters()}})
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
    classes = torch.as_tensor(condition, dtype=torch.int64)
    num_classes = model.config.num_classes
    if len(classes) != len(seeds):
        raise InputError(f"sample: {len(classes)} conditions but {len(seeds)} seeds; give one seed per picture")
    if len(classes) and not (int(classes.min()) >= 0 and int(classes.max()) <= num_classes):
        raise InputError(f"sample: classes must lie in 0..{num_classes - 1} ({num_classes} = no class)")
    device = next(model.parameters()).device
    objective = build_objective(model.card.recipe.diffusion)
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

    Raises InputError as ModelCard.load_codec.
    """
    return model.card.load_codec(latents.device).decode(model.card.denormalize(latents))
