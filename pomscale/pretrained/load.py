"""Trained models for people: load, sample, decode."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from rich.progress import track
from torch import Tensor

from pomscale.base.condition import Condition, Text, batch_size, map_condition
from pomscale.base.console import warn
from pomscale.base.errors import InputError
from pomscale.codecs.base import ClipCodec, Codec, TextEncoder
from pomscale.config.model import ImageModelConfig
from pomscale.config.schema import PixelCodecConfig, SamplerName
from pomscale.diffusion.draws import sampling_noise
from pomscale.diffusion.generate import generate
from pomscale.diffusion.objectives import build_objective
from pomscale.diffusion.options import SamplingOptions
from pomscale.distributed.world import resolve_device
from pomscale.models import DiPoM, VDiPoM
from pomscale.pretrained.card import ModelCard, null_text
from pomscale.pretrained.weights import open_weights
from pomscale.sampling.prompts import embed_prompts


class PretrainedDiPoM(DiPoM):
    """A DiPoM with its card, so that sampling and decoding know the objective, the normalisation and the codec."""

    def __init__(self, card: ModelCard) -> None:
        assert isinstance(card.model, ImageModelConfig)
        super().__init__(card.model)
        self.card = card

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> PretrainedModel:
        """`load_pretrained` under the name that other libraries have taught people to look for."""
        return load_pretrained(path, **options)

    @cached_property
    def codec(self) -> Codec:
        """The codec of the training latents, on the model's device. Raises InputError as ModelCard.load_codec."""
        return self.card.load_codec(self.head.weight.device)


class PretrainedVDiPoM(VDiPoM):
    """A V-DiPoM with its card, which knows the text encoder too."""

    def __init__(self, card: ModelCard) -> None:
        assert not isinstance(card.model, ImageModelConfig)
        super().__init__(card.model)
        self.card = card

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> PretrainedModel:
        """As `PretrainedDiPoM.from_pretrained`."""
        return load_pretrained(path, **options)

    @cached_property
    def codec(self) -> ClipCodec:
        """As `PretrainedDiPoM.codec`."""
        # A recipe for clips with a codec of pictures is refused.
        return cast(ClipCodec, self.card.load_codec(self.head.weight.device))

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """That of the training captions, on the model's device. InputError as ModelCard.load_text_encoder."""
        return self.card.load_text_encoder(self.head.weight.device)


PretrainedModel: TypeAlias = PretrainedDiPoM | PretrainedVDiPoM


def load_pretrained(
    path: str | Path,
    *,
    weights: str = "ema",
    device: str = "auto",
    codec_path: str | None = None,
    text_path: str | None = None,
) -> PretrainedModel:
    """The model of a run folder (newest complete checkpoint), a checkpoint or an exported folder; fp32, in eval mode.

    weights: "ema" (the average that stands for the model), "model" (as last trained) or the name of an average, such as
    "halflife-500000" or "power-0.05". device: "auto", "cpu" or "cuda". codec_path, text_path: where the weights of the
    codec and of the text encoder lie on this machine, if not where they lay in training.
    Raises InputError if there are no such weights at `path`, or if they are damaged.
    """
    source = open_weights(Path(path))
    card = source.card
    if codec_path is not None and not isinstance(card.codec, PixelCodecConfig):
        card = card.model_copy(update={"codec": card.codec.model_copy(update={"path": codec_path})})
    if text_path is not None:
        card = card.model_copy(update={"sampling": card.sampling.model_copy(update={"text_path": text_path})})
    with torch.device("meta"):
        model = PretrainedDiPoM(card) if isinstance(card.model, ImageModelConfig) else PretrainedVDiPoM(card)
    model.to_empty(device="cpu")
    source.read(source.resolve(weights), {name: p.detach() for name, p in model.named_parameters()})
    return model.requires_grad_(False).eval().to(resolve_device(device))


def sample(
    model: PretrainedModel,
    condition: Sequence[int] | Sequence[str] | Tensor | Text,
    *,
    seeds: Sequence[int],
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    known: Tensor | None = None,
    sampler: SamplerName | None = None,
    steps: int = 50,
    guidance: float = 0.0,
    batch: int = 64,
    show_progress: bool = False,
) -> Tensor:
    """Normalised latents (n c h w), or (n c f h w) of clips, fp32, for n class ids or n prompts, and n seeds.

    The batch size does not change them. sampler None follows the model's objective. guidance w: pred_c + w (pred_c -
    pred_u), 0 is off, w = diffusers' guidance_scale - 1.
    Of clips, whose frames are all generated at once (see clips.ClipStream for one frame group after another):
    num_frames: latent frames, by default as many as the model was made for; size and known as in `clip_size`; the first
    frames of the result are those of `known`.
    Raises InputError for unknown classes, frames that do not fill frame groups, or a wrong number of seeds.
    """
    if not isinstance(model, PretrainedDiPoM | PretrainedVDiPoM):
        raise InputError("sample: this network does not know its objective; use one of pomscale.load_pretrained")
    device = next(model.parameters()).device
    asked, nothing = _conditions(model, condition)
    num_samples = batch_size(asked)
    if num_samples != len(seeds):
        raise InputError(f"sample: {num_samples} conditions but {len(seeds)} seeds; give one seed per picture or clip")
    shape, group_frames = _shape(model, num_samples, num_frames, size, known)
    objective, options = build_objective(model.card.diffusion), SamplingOptions(sampler, steps, guidance)
    parts = []
    for start in track(range(0, num_samples, batch), "sampling", disable=not show_progress, transient=True):
        rows = list(range(start, min(start + batch, num_samples)))
        batch_condition = map_condition(asked, lambda part, rows=rows: part[rows].to(device))  # type: ignore[misc]
        parts.append(
            generate(
                objective,
                model,
                sampling_noise([seeds[row] for row in rows], shape, batch_condition, group_frames),
                batch_condition,
                map_condition(nothing, lambda part, rows=rows: part[[0] * len(rows)].to(device)),  # type: ignore[misc]
                options,
                known=None if known is None else known[rows],
            )
        )
    return torch.cat(parts)


def encode_prompts(model: PretrainedVDiPoM, prompts: Sequence[str]) -> Text:
    """What `sample` tells the network for these prompts: (n max_length dim) float16, on the CPU.

    Warns of prompts that are longer than the encoder takes. Raises InputError as ModelCard.load_text_encoder.
    """
    return embed_prompts(model.text_encoder, prompts)


def decode(model: PretrainedModel, latents: Tensor) -> Tensor:
    """Pictures (b 3|1 h w) or clips (b 3|1 f h w), fp32 in [0, 1], of normalised latents, with the model's codec.

    Raises InputError if the codec found now is not the one that made the training latents.
    """
    return model.codec.decode(model.card.denormalize(latents))


def _conditions(
    model: PretrainedModel, condition: Sequence[int] | Sequence[str] | Tensor | Text
) -> tuple[Condition, Condition]:
    """What is asked for (n), and what says nothing (1)."""
    if isinstance(model, PretrainedVDiPoM):
        if not isinstance(condition, Text):
            if isinstance(condition, str) or not all(isinstance(prompt, str) for prompt in condition):
                raise InputError("sample: this model is told texts; give a list of prompts")
            condition = encode_prompts(model, [str(prompt) for prompt in condition])
        return condition, null_text(model.card.texts)
    if isinstance(condition, Text) or any(isinstance(one, str) for one in condition):
        raise InputError("sample: this model is told classes; give class ids, not prompts")
    classes = torch.as_tensor(condition, dtype=torch.int64)
    num_classes = model.config.num_classes
    if len(classes) and not (int(classes.min()) >= 0 and int(classes.max()) <= num_classes):
        raise InputError(f"sample: classes must lie in 0..{num_classes - 1} ({num_classes} = no class)")
    return classes, torch.tensor([num_classes])


def clip_size(
    model: PretrainedVDiPoM, num_clips: int, size: tuple[int, int] | None, known: Tensor | None
) -> tuple[int, int]:
    """Latent (height, width) of clips: `size`, or that of `known`, or else that of the training clips.

    known: normalised latents (n c f h w) of the first f frames, which are given. InputError if these do not fit the
    model, the number of clips or each other.
    """
    channels, _, *trained_size = model.config.latent_shape
    height, width = size or (trained_size if known is None else known.shape[-2:])
    patch_size = model.config.patch_size
    if height % patch_size or width % patch_size:
        raise InputError(f"clips: latent size {height}x{width} is not divisible by patch_size {patch_size}")
    if known is not None and (*known.shape[:2], *known.shape[3:]) != (num_clips, channels, height, width):
        expected = f"({num_clips} {channels} frames {height} {width})"
        raise InputError(f"known: expected latents of shape {expected}, got {tuple(known.shape)}")
    return height, width


def warn_of_unseen_positions(model: PretrainedVDiPoM, num_groups: int) -> bool:
    """Whether clips of so many frame groups reach positions beyond those of training; if so, it is told."""
    num_seen = model.config.num_groups + model.card.diffusion.max_start_group
    if num_groups <= num_seen:
        return False
    warn(
        f"the model was trained on frame groups 0 to {num_seen - 1}: from there on clips are at positions that it has "
        "never seen, and may fall apart; train with a larger diffusion.max_start_group for longer ones"
    )
    return True


def _shape(
    model: PretrainedModel,
    num_samples: int,
    num_frames: int | None,
    size: tuple[int, int] | None,
    known: Tensor | None,
) -> tuple[tuple[int, ...], int | None]:
    """Of a sample's latents, and of clips the frames of a group."""
    if isinstance(model, PretrainedDiPoM):
        if any(option is not None for option in (num_frames, size, known)):
            raise InputError("sample: num_frames, size and known are for clips, and this model makes pictures")
        return model.config.latent_shape, None
    channels, most, *_ = model.config.latent_shape
    of_group = model.config.patch_frames
    if num_frames is not None and (num_frames < 1 or num_frames % of_group):
        raise InputError(f"sample: num_frames {num_frames} is no multiple of the model's {of_group} frames of a group")
    height, width = clip_size(model, num_samples, size, known)
    num_frames = num_frames or most
    if known is not None and known.shape[2] > num_frames:
        raise InputError(f"sample: {known.shape[2]} latent frames are known, and the clips have {num_frames}")
    warn_of_unseen_positions(model, num_frames // of_group)
    return (channels, num_frames, height, width), of_group
