"""Clips of any length from a trained model: frame group by frame group, at constant memory, and to be continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pomscale.base.condition import Text
from pomscale.base.errors import InputError
from pomscale.config.schema import SamplerName
from pomscale.diffusion.objectives import build_objective
from pomscale.diffusion.options import SamplingOptions
from pomscale.diffusion.sequential import SequentialSampler
from pomscale.models import MixerState
from pomscale.models.states import states_from_tensors, states_to_tensors
from pomscale.pretrained.card import null_text
from pomscale.pretrained.load import PretrainedVDiPoM, clip_size, encode_prompts, warn_of_unseen_positions
from pomscale.sampling.clip_state import read_clip_state, write_clip_state


class ClipStream(Iterator[Tensor]):
    """Iterates over the frame groups of b clips: normalised latents (b c patch_frames H W) fp32, on the model's device.

    Earlier groups are carried as a state, whose size does not grow with PoM mixers. Between two groups the stream can
    be saved, and `resume`d in another process: the groups that follow are the same, bit for bit.
    """

    def __init__(
        self,
        model: PretrainedVDiPoM,
        prompts: Sequence[str] | Text,
        seeds: Sequence[int],
        *,
        num_groups: int | None,
        sampler: SamplerName | None = None,
        steps: int = 50,
        guidance: float = 0.0,
        known: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """One prompt and one seed per clip. num_groups: how many this stream gives; None = it never ends.

        known: normalised latents (b c f H W) of the first f frames, which are given; one is enough, and they need not
        fill frame groups. They count among the groups. size: latent (height, width), by default that of `known` or of
        the training clips. sampler, steps and guidance as in `pretrained.sample`.
        Raises InputError for a model without the block-causal mask and for inputs that do not fit together.
        """
        _check_carries_state(model)
        config = model.config
        num_clips = len(prompts.mask) if isinstance(prompts, Text) else len(prompts)
        if num_clips != len(seeds):
            raise InputError(f"clips: {num_clips} prompts but {len(seeds)} seeds; give one seed per clip")
        height, width = clip_size(model, num_clips, size, known)
        self.prompts = None if isinstance(prompts, Text) else list(prompts)
        self.seeds = [int(seed) for seed in seeds]
        self._model = model
        self._text = _on(model, prompts if isinstance(prompts, Text) else encode_prompts(model, prompts))
        self._num_left = num_groups
        self._known = known
        self._sampling: dict[str, Any] = {"sampler": sampler, "steps": steps, "guidance": guidance}
        self._size = (height, width)
        self._has_warned = False
        nothing = _on(model, null_text(model.card.texts))
        self._clips: SequentialSampler[list[MixerState]] = SequentialSampler(
            build_objective(model.card.diffusion),
            model.step,
            (config.latent_shape[0], config.patch_frames, height, width),
            self._text,
            Text(*(part.expand(num_clips, *part.shape[1:]) for part in nothing)),
            self.seeds,
            SamplingOptions(sampler, steps, guidance),
            time_per_group=model.card.diffusion.time.per_frame_group,
        )

    @property
    def next_group(self) -> int:
        """Number of the frame group that comes next, counted from the beginning of the clips."""
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
        """Everything that the following groups depend on, but the model; `extra` is kept beside it for the caller.

        Between two groups, at any time. PomscaleError if the file cannot be written.
        """
        meta = {
            "model": _identity(self._model),
            "next_group": self.next_group,
            "num_states": len(self._clips.states),
            "prompts": self.prompts,
            "seeds": self.seeds,
            "size": self._size,
            "sampling": self._sampling,
        }
        tensors = {f"text.{name}": part for name, part in self._text._asdict().items()}
        if self._known is not None:
            tensors["known"] = self._known
        for number, states in enumerate(self._clips.states):
            tensors |= {f"states.{number}.{name}": part for name, part in states_to_tensors(states).items()}
        tensors |= {f"extra.{name}": part for name, part in (extra or {}).items()}
        write_clip_state(path, meta, tensors)

    @classmethod
    def resume(
        cls, model: PretrainedVDiPoM, path: Path, *, num_groups: int | None
    ) -> tuple[ClipStream, dict[str, Tensor]]:
        """A saved stream, for num_groups further groups, and what was saved as `extra` (on the CPU).

        Raises InputError if the file is damaged, is no such state, or is one of another model.
        """
        meta, tensors = read_clip_state(path)
        _check_carries_state(model)
        if meta["model"] != _identity(model):
            raise InputError(
                f"{path}: these clips are of another model, or of other weights or another precision of it; "
                "go on with the one that they were begun with, or begin new clips"
            )
        device = model.head.weight.device

        def part(name: str) -> dict[str, Tensor]:
            start = f"{name}."
            return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}

        stream = cls(
            model,
            Text(**part("text")),
            meta["seeds"],
            num_groups=num_groups,
            known=tensors.get("known"),
            size=tuple(meta["size"]),
            **meta["sampling"],
        )
        stream.prompts = meta["prompts"]
        stream._clips.next_group = meta["next_group"]
        for number in range(meta["num_states"]):
            on_device = {name: tensor.to(device) for name, tensor in part(f"states.{number}").items()}
            stream._clips.states.append(states_from_tensors(model.config, on_device))
        return stream, part("extra")


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
    """SHA-256 of what the frames depend on: of the card, and of a few numbers of every tensor of the weights."""
    card = model.card
    told = {
        # Without what is as by default, so that a later version with more settings still knows its models.
        "model": card.model.model_dump(mode="json", exclude_defaults=True),
        "diffusion": card.diffusion.model_dump(mode="json", exclude_defaults=True),
        "latents": [card.codec_identity, card.latent_mean, card.latent_std],
        "text": card.texts.identity,
        "dtype": str(model.head.weight.dtype),
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    some = torch.cat([parameter.detach().flatten()[:16].float() for parameter in model.parameters()])
    digest.update(some.cpu().numpy().tobytes())
    return digest.hexdigest()
