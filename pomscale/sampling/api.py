"""Sample from a trained model, and decode what it gives: `pomscale.sample` and `pomscale.decode`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from pomscale.base.condition import Condition, Text, batch_size, map_condition
from pomscale.base.console import track, warn
from pomscale.base.errors import InputError
from pomscale.config.time_shift import time_shift
from pomscale.data.texts import null_text
from pomscale.diffusion.draws import sampling_noise, step_noise
from pomscale.diffusion.generate import generate
from pomscale.diffusion.guidance import Autoguided
from pomscale.diffusion.objectives import Network, build_objective
from pomscale.diffusion.options import SamplingArguments, SamplingOptions
from pomscale.pretrained.load import PretrainedDiPoM, PretrainedModel, PretrainedVDiPoM
from pomscale.sampling.guides import check_guide
from pomscale.sampling.prompts import embed_prompts


class ClipArguments(TypedDict, total=False):
    """Arguments of `sample` for clips, and the size of pictures of a text.

    num_frames: Latent frames of each clip; by default as many as the model was made for.
    size: Latent (height, width); by default that of `known`, or else that of the model's config.
    known: Normalised latents (n c f h w) of the first f frames, which are given. The clips begin with them.
    """

    num_frames: int | None
    size: tuple[int, int] | None
    known: Tensor | None


class SampleArguments(SamplingArguments, ClipArguments, total=False):
    """Arguments of `sample` beside model, condition and seeds; see SamplingOptions and ClipArguments."""


def sample(
    model: PretrainedModel,
    condition: Sequence[int] | Sequence[str] | Tensor | Text,
    *,
    seeds: Sequence[int],
    guide: PretrainedModel | None = None,
    batch: int = 64,
    show_progress: bool = False,
    **options: Unpack[SampleArguments],
) -> Tensor:
    """Sample latents from a trained model.

    All frames of a clip are generated at once; ClipStream generates one frame group after another.

    Args:
        model: A model that `load_pretrained` returned.
        condition: n class ids, n prompts, or a text batch of n.
        seeds: One seed per sample.
        guide: A weaker model of the same data, such as an earlier checkpoint or a smaller network: guidance leads away
            from its prediction (autoguidance) instead of the unconditional one.
        batch: Most samples at once; it does not change them.
        show_progress: Show progress on standard error.
        **options: sampler (None follows the model's objective), num_steps (50), guidance (0 is off) and the others of
            SamplingOptions, and those of ClipArguments.

    Returns:
        Normalised latents (n c h w), or (n c f h w) of clips, fp32, on the model's device.

    Raises:
        InputError: The classes are unknown, the frames do not fill frame groups, the number of seeds is wrong, the
            options contradict each other or the model's objective, or the guide is of other data.
    """
    clips: Any = {name: value for name, value in options.items() if name in ClipArguments.__annotations__}
    others: Any = {name: value for name, value in options.items() if name not in clips}
    return sample_latents(
        model,
        condition,
        seeds,
        SamplingOptions(**others),
        batch=batch,
        show_progress=show_progress,
        guide=guide,
        **clips,
    )


def sample_latents(
    model: PretrainedModel,
    condition: Sequence[int] | Sequence[str] | Tensor | Text,
    seeds: Sequence[int],
    options: SamplingOptions,
    *,
    batch: int = 64,
    show_progress: bool = False,
    guide: PretrainedModel | None = None,
    **clips: Unpack[ClipArguments],
) -> Tensor:
    """Do what `sample` says, with its options in one object."""
    if not isinstance(model, PretrainedDiPoM | PretrainedVDiPoM):
        raise InputError("sample: this network does not know its objective; use one of pomscale.load_pretrained")
    device = next(model.parameters()).device
    asked, nothing = _conditions(model, condition)
    num_samples = batch_size(asked)
    if num_samples != len(seeds):
        raise InputError(f"sample: {num_samples} conditions but {len(seeds)} seeds; give one seed per picture or clip")
    shape, group_frames = _shape(model, num_samples, **clips)
    known = clips.get("known")
    diffusion = model.card.diffusion
    options = options.resolved(diffusion.objective, time_shift(diffusion, model.config, shape))
    network: Network | Autoguided[Network] = model
    if guide is not None:
        check_guide(model, guide, options)
        network = Autoguided[Network](model, guide)
    parts = []
    for first in track(range(0, num_samples, batch), "batches", -(-num_samples // batch), enabled=show_progress):
        rows = list(range(first, min(first + batch, num_samples)))
        batch_seeds = [seeds[row] for row in rows]
        batch_condition = map_condition(asked, lambda part, rows=rows: part[rows].to(device))  # type: ignore[misc]
        parts.append(
            generate(
                build_objective(diffusion),
                network,
                sampling_noise(batch_seeds, shape, batch_condition, group_frames),
                batch_condition,
                map_condition(nothing, lambda part, rows=rows: part[[0] * len(rows)].to(device)),  # type: ignore[misc]
                options,
                known=None if known is None else known[rows],
                step_noise=step_noise(batch_seeds, shape, batch_condition, group_frames),
            )
        )
    return torch.cat(parts)


def decode(model: PretrainedModel, latents: Tensor) -> Tensor:
    """Decode normalised latents with the model's codec.

    Args:
        model: A model that `load_pretrained` returned.
        latents: Normalised latents (b c h w) or (b c f h w), on the model's device.

    Returns:
        Pictures (b 3|1 h w) or clips (b 3|1 f h w), fp32 in [0, 1].

    Raises:
        InputError: The codec found now is not the codec of the training latents.
    """
    return model.codec.decode(model.card.denormalize(latents))


def clip_size(
    model: PretrainedVDiPoM, num_clips: int, size: tuple[int, int] | None, known: Tensor | None
) -> tuple[int, int]:
    """Return the latent (height, width) of clips; size and known as in ClipArguments.

    Raise InputError if these do not fit the model, the number of clips or each other.
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
    """Warn if clips of so many frame groups reach positions beyond those of training; return whether they do."""
    num_seen = model.config.num_groups + model.card.diffusion.max_start_group
    if num_groups <= num_seen:
        return False
    warn(
        f"the model was trained on frame groups 0 to {num_seen - 1}: from there on clips are at positions that it has "
        "never seen, and may fall apart; train with a larger diffusion.max_start_group for longer ones"
    )
    return True


def _conditions(
    model: PretrainedModel, condition: Sequence[int] | Sequence[str] | Tensor | Text
) -> tuple[Condition, Condition]:
    """Return the checked condition (n) and the null condition (1)."""
    if isinstance(model, PretrainedVDiPoM) or model.config.num_classes is None:
        if not isinstance(condition, Text):
            if isinstance(condition, str) or not all(isinstance(prompt, str) for prompt in condition):
                raise InputError("sample: this model is conditioned on texts; give a list of prompts")
            condition = embed_prompts(model.text_encoder, [str(prompt) for prompt in condition])
        return condition, null_text(model.card.texts)
    if isinstance(condition, Text) or any(isinstance(one, str) for one in condition):
        raise InputError("sample: this model is conditioned on classes; give class ids, not prompts")
    classes = torch.as_tensor(condition, dtype=torch.int64)
    num_classes = model.config.num_classes
    if len(classes) and not (int(classes.min()) >= 0 and int(classes.max()) <= num_classes):
        raise InputError(f"sample: classes must lie in 0..{num_classes - 1} ({num_classes} = no class)")
    return classes, torch.tensor([num_classes])


def _shape(
    model: PretrainedModel,
    num_samples: int,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    known: Tensor | None = None,
) -> tuple[tuple[int, ...], int | None]:
    """Return the shape of a sample's latents, and for clips the latent frames of a frame group."""
    if isinstance(model, PretrainedDiPoM):
        return _shape_of_pictures(model, num_frames, size, known), None
    channels, most, *_ = model.config.latent_shape
    patch_frames = model.config.patch_frames
    if num_frames is not None and (num_frames < 1 or num_frames % patch_frames):
        raise InputError(
            f"sample: num_frames {num_frames} is no multiple of the model's {patch_frames} frames of a group"
        )
    height, width = clip_size(model, num_samples, size, known)
    num_frames = num_frames or most
    if known is not None and known.shape[2] > num_frames:
        raise InputError(f"sample: {known.shape[2]} latent frames are known, and the clips have {num_frames}")
    warn_of_unseen_positions(model, num_frames // patch_frames)
    return (channels, num_frames, height, width), patch_frames


def _shape_of_pictures(
    model: PretrainedDiPoM, num_frames: int | None, size: tuple[int, int] | None, known: Tensor | None
) -> tuple[int, int, int]:
    if num_frames is not None or known is not None:
        raise InputError("sample: num_frames and known are for clips, and this model makes pictures")
    if size is None:
        return model.config.latent_shape
    if model.config.num_classes is not None:
        raise InputError("sample: size is for models of texts, and this model makes pictures of classes, of one size")
    patch_size = model.config.patch_size
    if size[0] % patch_size or size[1] % patch_size:
        raise InputError(f"sample: latent size {size[0]}x{size[1]} is not divisible by patch_size {patch_size}")
    return (model.config.latent_shape[0], *size)
