"""Clips of any length from a trained model: frame group by frame group, at constant memory, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from pomscale.base.condition import Text
from pomscale.base.errors import InputError
from pomscale.config.time_shift import time_shift
from pomscale.data.texts import null_text
from pomscale.diffusion.guidance import Autoguided
from pomscale.diffusion.objectives import build_objective
from pomscale.diffusion.options import SamplingArguments, SamplingOptions
from pomscale.diffusion.sequential import SequentialSampler
from pomscale.models import MixerState
from pomscale.models.states import states_from_tensors, states_to_tensors
from pomscale.pretrained.load import PretrainedVDiPoM
from pomscale.sampling.api import clip_size, warn_of_unseen_positions
from pomscale.sampling.clip_state import read_clip_state, write_clip_state
from pomscale.sampling.guides import check_stream_guide
from pomscale.sampling.prompts import embed_prompts


class ClipStream(Iterator[Tensor]):
    """An iterator over the frame groups of b clips.

    It gives normalised latents (b c patch_frames H W) fp32 on the model's device. Earlier groups are carried as a
    state, whose size does not grow with PoM mixers. Between two groups the stream can be saved, and `resume`d in
    another process: the groups that follow are the same, bit for bit.
    """

    def __init__(
        self,
        model: PretrainedVDiPoM,
        prompts: Sequence[str] | Text,
        seeds: Sequence[int],
        *,
        num_groups: int | None,
        known: Tensor | None = None,
        size: tuple[int, int] | None = None,
        guide: PretrainedVDiPoM | None = None,
        **sampling: Unpack[SamplingArguments],
    ) -> None:
        """Prepare the clips; nothing is generated yet.

        Args:
            model: A model with the block-causal mask.
            prompts: One prompt per clip, or a text batch of them.
            seeds: One seed per clip.
            num_groups: Number of frame groups that this stream gives; None = it never ends.
            known: Normalised latents (b c f H W) of the first f frames, which are given. One frame is enough, and they
                need not fill frame groups. They count among the groups.
            size: Latent (height, width); by default that of `known`, or else that of the training clips.
            guide: A weaker model, trained in the same form, that guidance leads away from (autoguidance).
            **sampling: sampler, num_steps, guidance and the others of SamplingOptions.

        Raises:
            InputError: The model has no block-causal mask, or the inputs do not fit together.
        """
        _check_carries_state(model)
        config = model.config
        num_clips = len(prompts.mask) if isinstance(prompts, Text) else len(prompts)
        if num_clips != len(seeds):
            raise InputError(f"clips: {num_clips} prompts but {len(seeds)} seeds; give one seed per clip")
        height, width = clip_size(model, num_clips, size, known)
        self.prompts = None if isinstance(prompts, Text) else list(prompts)
        self.seeds = [int(seed) for seed in seeds]
        self._model, self._guide = model, guide
        self._text = _on(model, prompts if isinstance(prompts, Text) else embed_prompts(model.text_encoder, prompts))
        self._num_left = num_groups
        self._known = known
        diffusion = model.card.diffusion
        # The length of a stream is not known; it counts as many frames as the clips of training have.
        shift = time_shift(diffusion, config, (*config.latent_shape[:2], height, width))
        self._options = SamplingOptions(**sampling).resolved(diffusion.objective, shift)
        if guide is not None:
            check_stream_guide(model, guide, self._options)
        self._size = (height, width)
        self._has_warned = False
        nothing = _on(model, null_text(model.card.texts))
        self._clips: SequentialSampler[list[MixerState]] = SequentialSampler(
            build_objective(diffusion),
            model.step if guide is None else Autoguided(model.step, guide.step),
            (config.latent_shape[0], config.patch_frames, height, width),
            self._text,
            Text(*(part.expand(num_clips, *part.shape[1:]) for part in nothing)),
            self.seeds,
            self._options,
            time_per_group=diffusion.time.per_frame_group,
        )

    @property
    def next_group(self) -> int:
        """Number of the next frame group, counted from the beginning of the clips."""
        return self._clips.next_group

    def __next__(self) -> Tensor:
        if self._num_left == 0:
            raise StopIteration
        self._has_warned = self._has_warned or warn_of_unseen_positions(self._model, self.next_group + 1)
        first, rest = None, None
        if self._known is not None:
            patch_frames = self._model.config.patch_frames
            first, rest = self._known[:, :, :patch_frames], self._known[:, :, patch_frames:]
        group = self._clips.advance(first)
        self._known = rest if rest is not None and rest.shape[2] else None
        if self._num_left is not None:
            self._num_left -= 1
        return group

    def save(self, path: Path, extra: Mapping[str, Tensor] | None = None) -> None:
        """Save everything but the model that the following groups depend on; possible between any two groups.

        Args:
            path: The file to write.
            extra: Tensors that the caller wants back from `resume`.

        Raises:
            PomscaleError: The file cannot be written.
        """
        meta = {
            "model": _identity(self._model),
            "next_group": self.next_group,
            "num_states": len(self._clips.states),
            "prompts": self.prompts,
            "seeds": self.seeds,
            "size": self._size,
            "sampling": self._options.settings(),
            "guide": None if self._guide is None else _identity(self._guide),
            "num_worse_states": len(self._clips.worse_states),
        }
        tensors = {f"text.{name}": part for name, part in self._text._asdict().items()}
        if self._known is not None:
            tensors["known"] = self._known
        for kind, of_kind in (("states", self._clips.states), ("worse_states", self._clips.worse_states)):
            for number, states in enumerate(of_kind):
                tensors |= {f"{kind}.{number}.{name}": part for name, part in states_to_tensors(states).items()}
        tensors |= {f"extra.{name}": part for name, part in (extra or {}).items()}
        write_clip_state(path, meta, tensors)

    @classmethod
    def resume(
        cls, model: PretrainedVDiPoM, path: Path, *, num_groups: int | None, guide: PretrainedVDiPoM | None = None
    ) -> tuple[ClipStream, dict[str, Tensor]]:
        """Load a saved stream.

        Args:
            model: The model that began the clips.
            path: The file that `save` wrote.
            num_groups: Number of further frame groups that the stream gives; None = it never ends.
            guide: The guide that the clips were begun with, if they had one.

        Returns:
            The stream, and the tensors that were saved as `extra` (on the CPU).

        Raises:
            InputError: The file is damaged, is no such state, or belongs to another model or guide.
        """
        meta, tensors = read_clip_state(path)
        _check_carries_state(model)
        if meta["model"] != _identity(model):
            raise InputError(
                f"{path}: these clips are of another model, or of other weights or another precision of it; "
                "continue with the model that began them, or begin new clips"
            )
        _check_same_guide(path, meta.get("guide"), guide)
        device = model.head.weight.device

        def part(name: str) -> dict[str, Tensor]:
            prefix = f"{name}."
            return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

        stream = cls(
            model,
            Text(**part("text")),
            meta["seeds"],
            num_groups=num_groups,
            known=tensors.get("known"),
            size=tuple(meta["size"]),
            guide=guide,
            **asdict(SamplingOptions.from_settings(meta["sampling"])),
        )
        stream.prompts = meta["prompts"]
        stream._clips.next_group = meta["next_group"]
        for kind, of_kind, config in (
            ("states", stream._clips.states, model.config),
            ("worse_states", stream._clips.worse_states, (guide or model).config),
        ):
            for number in range(meta.get(f"num_{kind}", 0)):
                on_device = {name: tensor.to(device) for name, tensor in part(f"{kind}.{number}").items()}
                of_kind.append(states_from_tensors(config, on_device))
        return stream, part("extra")


def _check_same_guide(path: Path, begun_with: str | None, guide: PretrainedVDiPoM | None) -> None:
    if begun_with == (None if guide is None else _identity(guide)):
        return
    if guide is None:
        raise InputError(f"{path}: these clips were begun with a guide; give the same one")
    if begun_with is None:
        raise InputError(f"{path}: these clips were begun without a guide; continue them without one")
    raise InputError(
        f"{path}: these clips were begun with another guide, or with other weights of it; give the same one"
    )


def _check_carries_state(model: PretrainedVDiPoM) -> None:
    if not isinstance(model, PretrainedVDiPoM):
        raise InputError("clips: this model makes pictures; give one that was trained on clips (model.kind: video)")
    if model.config.temporal != "block_causal":
        raise InputError(
            "clips: this model reads all frames at once and cannot make them one after another; draw whole clips with "
            "pomscale.sample, or train it with model.temporal: block_causal"
        )


def _on(model: PretrainedVDiPoM, text: Text) -> Text:
    device = model.head.weight.device
    return Text(text.embeddings.to(device), text.mask.to(device))


def _identity(model: PretrainedVDiPoM) -> str:
    """Return the SHA-256 of the parts of the card that frames depend on, and of a few numbers of every tensor."""
    card = model.card
    facts = {
        # Defaults are excluded, so that a later version with more settings still recognises its models.
        "model": card.model.model_dump(mode="json", exclude_defaults=True),
        "diffusion": card.diffusion.model_dump(mode="json", exclude_defaults=True),
        "latents": [card.codec_identity, card.latent_mean, card.latent_std],
        "text": card.texts.joint_identity,
        "dtype": str(model.head.weight.dtype),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    some = torch.cat([parameter.detach().flatten()[:16].float() for parameter in model.parameters()])
    digest.update(some.cpu().numpy().tobytes())
    return digest.hexdigest()
