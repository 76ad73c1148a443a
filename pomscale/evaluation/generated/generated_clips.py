"""Clips that a trained model generates from prompts: clip i is the same on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pomscale.base.condition import Text
from pomscale.base.errors import InputError
from pomscale.evaluation.generated.clip_frames import decode_frames
from pomscale.evaluation.generated.generated_pictures import PicturesOfClasses, PicturesOfTexts
from pomscale.evaluation.generated.picture_sets import Batch, Frames
from pomscale.evaluation.generated.prompts import DrawnPrompts
from pomscale.evaluation.generated.trained_model import Drawing, ModelSource, TrainedModel
from pomscale.pretrained.load import PretrainedVDiPoM
from pomscale.sampling.api import sample_latents
from pomscale.sampling.clips import clip_codec, num_latent_frames, pixel_size
from pomscale.sampling.guides import check_guide, check_stream_guide
from pomscale.sampling.stream import ClipStream

DEFAULT_NUM_CLIPS = 2_048
"""Number of clips that FVD is usually reported of (Skorokhodov et al., StyleGAN-V, 2022)."""


class GeneratedClips:
    """Clips of a model, of which any process may make any part.

    They are made as `pomscale sample` makes them: frame group by frame group by a model with the block-causal mask,
    which stops after the last frame that is measured, and all frames at once by others.
    """

    has_captions = True

    def __init__(self, source: ModelSource, drawing: Drawing, frames: Frames) -> None:
        """Load the model, its codec and its text encoder.

        Raises:
            InputError: There is no such model, set of weights, codec or text encoder, it makes pictures, there is no
                prompt, or its clips have too few frames.
        """
        self.name = str(source.path)
        self.frames, self._drawing = frames, drawing
        self.model = TrainedModel(source, drawing.changes, PretrainedVDiPoM)
        network = self.model.network
        prompts = drawing.prompts or self.model.card.sampling.prompts
        self._prompts = DrawnPrompts(self.name, "clips", prompts, network.text_encoder)
        self._codec = clip_codec(network)
        self._num_latent = num_latent_frames(network, drawing.num_frames)
        self._num_frames = self._codec.num_pixel_frames(self._num_latent)
        if self._num_frames < frames.span:
            raise InputError(
                f"{self.name}: its clips have {self._num_frames} frames, and {frames.span} are needed ({frames}); draw "
                f"longer ones with --frames, or measure fewer frames"
            )
        self.num_pictures = drawing.num
        self.num_channels = self._codec.num_channels_in
        self.size: tuple[int, ...] | None = (frames.num, *pixel_size(network, drawing.size))
        self.fps = self.model.card.fps
        self._is_stream = network.config.temporal == "block_causal"
        self._options = self.model.options_of(self._shape())
        self._check_ways(source)

    def _shape(self) -> tuple[int, ...]:
        """Return the latent shape (c, f, h, w) that shifts times; a stream counts the frames of the training clips."""
        assert self.size is not None
        channels, frames = self.model.network.config.latent_shape[:2]
        sides = (side // self._codec.factor for side in self.size[1:])
        return (channels, frames if self._is_stream else self._num_latent, *sides)

    def _check_ways(self, source: ModelSource) -> None:
        """Raise InputError if the guide does not fit, or what is to be compiled is not called."""
        if self.model.guide is not None:
            check = check_stream_guide if self._is_stream else check_guide
            check(self.model.network, self.model.guide, self._options)
        if source.compile and self._is_stream:
            raise InputError(
                f"{self.name}: --compile: this model makes clips frame group by frame group, which is not compiled; "
                f"leave it out"
            )

    @property
    def crop(self) -> dict[str, Any] | None:
        return self.model.crop

    def identity(self) -> dict[str, Any]:
        return self.settings()

    def settings(self) -> dict[str, Any]:
        return {
            **self.model.settings(self._options),
            "text_encoder": self.model.card.texts.joint_identity,
            "drawn": {
                "number": self.num_pictures,
                "seed": self._drawing.seed,
                "prompts": self._prompts.settings(),
                "frames": self._num_frames,
            },
        }

    def batches(self, begin: int, end: int, batch: int) -> Iterator[Batch]:
        """Yield clips, drawn and decoded batch by batch."""
        for first in range(begin, end, batch):
            numbers = list(range(first, min(first + batch, end)))
            prompts = self._prompts.of(numbers)
            yield Batch(numbers, self._draw(numbers, prompts), captions=prompts)

    @torch.inference_mode()
    def _draw(self, numbers: Sequence[int], prompts: Sequence[str]) -> Tensor:
        """Return clips (b 1|3 f h w) uint8."""
        assert self.size is not None
        seeds = [self._drawing.seed + number for number in numbers]
        text = self._prompts.embedded(prompts)
        pixels = torch.empty(len(numbers), self.num_channels, *self.size, dtype=torch.uint8)
        latents = map(self.model.card.denormalize, self._latents(text, seeds))
        decode_frames(self.name, self._codec.decoder(self._num_latent), latents, self.frames, pixels)
        return pixels

    def _latents(self, text: Text, seeds: Sequence[int]) -> Iterator[Tensor]:
        """Return the normalised latents (b c p h w) of one frame group after another."""
        assert self.size is not None
        network, guide, options = self.model.network, self.model.guide, self._options
        height, width = self._shape()[2:]
        patch_frames = network.config.patch_frames
        if self._is_stream:
            num_groups = self._num_latent // patch_frames
            return ClipStream(
                network, text, seeds, num_groups=num_groups, size=(height, width), guide=guide, **asdict(options)
            )
        latents = sample_latents(
            network,
            text,
            seeds,
            options,
            batch=len(seeds),
            guide=guide,
            num_frames=self._num_latent,
            size=(height, width),
        )
        return iter(latents.split(patch_frames, dim=2))


Generated: TypeAlias = PicturesOfClasses | PicturesOfTexts | GeneratedClips
"""Pictures or clips that a trained model draws."""
