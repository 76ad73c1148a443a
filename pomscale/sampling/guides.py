"""Whether a second model can be the guide of a first (autoguidance, Karras et al. 2024)."""

from __future__ import annotations

import torch

from pomscale.base.errors import InputError
from pomscale.diffusion.options import SamplingOptions
from pomscale.pretrained.load import PretrainedDiPoM, PretrainedModel, PretrainedVDiPoM


def check_guide(model: PretrainedModel, guide: PretrainedModel, options: SamplingOptions) -> None:
    """Raise InputError, with one line that says why, unless both models predict the same thing of the same latents.

    A guide with the weights of the model itself is refused, too, from whatever file they come.

    Args:
        model: The model that is sampled from.
        guide: The weaker model.
        options: Options of sampling; guidance must be on.
    """
    check_guidance(options)
    for what, wanted, found in _facts(model, guide):
        if wanted != found:
            raise InputError(
                f"guide: its {what} is {found}, and the model's is {wanted}; a guide is a weaker model of the same "
                "data, such as an earlier checkpoint of the run or a smaller network"
            )
    if _forms(model) == _forms(guide) and _are_equal(model, guide):
        raise InputError(
            "guide: its weights are those of the model itself, so that guidance would change nothing and cost twice; "
            "give an earlier checkpoint of the run or a smaller network"
        )


def check_guidance(options: SamplingOptions) -> None:
    """Raise InputError if a guide would change nothing, whichever it is."""
    if options.guidance == 0:
        raise InputError("guide: guidance is 0, so that a guide would change nothing; give a weight with guidance")


def _are_equal(model: PretrainedModel, guide: PretrainedModel) -> bool:
    """Return whether all weights are the same numbers; those of two trainings differ in the first tensor."""
    mine, theirs = dict(model.named_parameters()), dict(guide.named_parameters())
    return mine.keys() == theirs.keys() and all(
        weight.shape == theirs[name].shape and torch.equal(weight, theirs[name].to(weight))
        for name, weight in mine.items()
    )


def _facts(model: PretrainedModel, guide: PretrainedModel) -> list[tuple[str, object, object]]:
    """Return what both must have in common, each with its value of the model and of the guide."""
    one, other = model.card, guide.card
    if one.model.kind != other.model.kind:
        return [("model.kind", one.model.kind, other.model.kind)]
    facts: list[tuple[str, object, object]] = [
        ("objective", one.diffusion.objective, other.diffusion.objective),
        ("noise scale", one.diffusion.noise_scale, other.diffusion.noise_scale),
        ("codec", one.codec.name, other.codec.name),
        ("mean of the latents", one.latent_mean, other.latent_mean),
        ("standard deviation of the latents", one.latent_std, other.latent_std),
    ]
    if isinstance(model, PretrainedDiPoM) and isinstance(guide, PretrainedDiPoM):
        facts.insert(0, ("latent shape", model.config.latent_shape, guide.config.latent_shape))
        facts.append(("number of classes", model.config.num_classes, guide.config.num_classes))
        facts.append(("text encoder", _text_encoder(model), _text_encoder(guide)))
    if isinstance(model, PretrainedVDiPoM) and isinstance(guide, PretrainedVDiPoM):
        # A guide may have seen clips of another length and size.
        facts.insert(0, ("number of latent channels", model.config.latent_shape[0], guide.config.latent_shape[0]))
        facts.append(("text encoder", _text_encoder(model), _text_encoder(guide)))
    if one.codec_identity is not None and other.codec_identity is not None:
        facts.append(("codec's weights", one.codec_identity, other.codec_identity))
    if one.class_names and other.class_names:
        facts.append(("class names", one.class_names, other.class_names))
    return facts


def check_clip_guide(model: PretrainedVDiPoM, guide: PretrainedVDiPoM, options: SamplingOptions) -> None:
    """Raise InputError unless the guide can go along with clips as this model makes them."""
    check = check_stream_guide if model.config.temporal == "block_causal" else check_guide
    check(model, guide, options)


def check_stream_guide(model: PretrainedVDiPoM, guide: PretrainedVDiPoM, options: SamplingOptions) -> None:
    """Raise InputError unless the guide can go along with clips that are made frame group by frame group."""
    check_guide(model, guide, options)
    forms = [_forms(one) for one in (model, guide)]
    if forms[0] != forms[1]:
        of_model, of_guide = (
            f"temporal {temporal}, patch_frames {frames}, {'a t per frame group' if per_group else 'one t'}"
            for temporal, frames, per_group in forms
        )
        raise InputError(
            f"guide: it was trained with {of_guide}, and the model with {of_model}; clips that are made frame group by "
            "frame group need both alike"
        )


def _text_encoder(model: PretrainedModel) -> str | None:
    return None if model.card.text is None else model.card.text.joint_identity


def _forms(model: PretrainedModel) -> tuple[str, int, bool]:
    """Return how a network makes clips: temporal, patch_frames, and whether a frame group has a t of its own."""
    if not isinstance(model, PretrainedVDiPoM):
        return ("none", 1, False)
    return (model.config.temporal, model.config.patch_frames, model.card.diffusion.time.per_frame_group)
