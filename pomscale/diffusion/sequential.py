"""Sample clips frame group by frame group: the past is a carried state, and finished frames are not read again.

The network needs the block-causal mask, and predicts a frame group from the state of the groups before it. The state
depends on how the network was trained. Both forms are exact:

    (a) one t for all frames. While a group is denoised, the groups before it pass through the same noise levels. So
        there is a state for each network evaluation of the sampler: evaluation i of a group continues what evaluation i
        of the group before has left. The clip equals the one of sampling all frames at once.
    (b) t per frame group (diffusion forcing, Chen et al. 2024). The groups before are clean: each finished group goes
        through the network once more with t = 0, and only the state of that is carried. A prediction is that of all
        frames at once with t = (0, .., 0, t).

Shapes: b clips, c latent channels, p latent frames of a frame group, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pomscale.base.condition import Condition, Text
from pomscale.diffusion.draws import sampling_noise
from pomscale.diffusion.generate import sample_after
from pomscale.diffusion.guidance import guided
from pomscale.diffusion.objectives import Objective
from pomscale.diffusion.options import SamplingOptions
from pomscale.diffusion.samplers import DEFAULT_SAMPLER, SAMPLERS
from pomscale.diffusion.samplers.types import Denoiser

State = TypeVar("State")
"""State of the network after some frame groups, of any type."""

Step = Callable[[Tensor, Tensor, Text, State | None, int], tuple[Tensor, State]]
"""(latents (b c p H W), t (b,), text, state of the groups before or None, number of the group) ->
prediction (b c p H W), state of the groups up to this one. The given state is not changed."""


class SequentialSampler(Generic[State]):
    """Samples b clips frame group by frame group. `states` and `next_group` hold the whole past.

    Attributes:
        states: One state for each network evaluation of the sampler in form (a), one in form (b), none before the first
            group. With guidance they belong to a batch of 2b. They only change between two groups, so at any other time
            they belong to `next_group`.
        next_group: Number of the frame group that `advance` samples next.
    """

    def __init__(
        self,
        objective: Objective,
        step: Step[State],
        group_shape: tuple[int, int, int, int],
        text: Text,
        null_text: Text,
        seeds: Sequence[int],
        options: SamplingOptions = SamplingOptions(),  # noqa: B008  frozen
        *,
        time_per_group: bool,
    ) -> None:
        """Prepare b clips.

        Args:
            objective: What the network was trained to predict.
            step: The network.
            group_shape: (c p H W) of a frame group.
            text: Texts of the b clips.
            null_text: b texts that say nothing, for guidance.
            seeds: One seed per clip.
            options: Sampler, steps and guidance.
            time_per_group: Whether the network was trained with a t per frame group: form (b), else form (a).
        """
        self.states: list[State] = []
        self.next_group = 0
        self._objective = objective
        self._step = step
        self._group_shape = group_shape
        self._text = text
        self._null_text = null_text
        self._seeds = seeds
        self._time_per_group = time_per_group
        self._sample = SAMPLERS[options.sampler or DEFAULT_SAMPLER[objective.name]]
        self._times = objective.time_grid(options.num_steps).float()
        self._guidance = options.guidance

    @torch.no_grad()
    def advance(self, known: Tensor | None = None) -> Tensor:
        """Return the next frame group, normalised latents (b c p H W) fp32.

        Args:
            known: (b c f H W), f <= p, the first f frames of the group where they are given.
        """
        states: list[State] = []
        group_frames = self._group_shape[1]
        noise = sampling_noise(self._seeds, self._group_shape, self._text, group_frames, first_group=self.next_group)
        known = None if known is None else known.to(noise)
        if not self._time_per_group:
            latents = self._draw(self._carrying(states), noise, known)
        else:
            if known is not None and known.shape[2] == group_frames:
                latents = known
            else:
                latents = self._draw(self._reading(), noise, known)
            self._carrying(states)(latents, latents.new_zeros(len(latents)))
        self.states = states
        self.next_group += 1
        return latents

    def _draw(self, denoise: Denoiser, noise: Tensor, known: Tensor | None) -> Tensor:
        if known is None:
            return self._sample(self._objective, denoise, noise, self._times)
        return sample_after(known, self._sample, self._objective, denoise, noise, self._times)

    def _reading(self) -> Denoiser:
        """Return the network that reads the one state of the groups before, and leaves none."""
        state = self.states[0] if self.states else None

        def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            assert isinstance(condition, Text)
            return self._step(x, t, condition, state, self.next_group)[0]

        return guided(network, self._text, self._null_text, self._guidance)

    def _carrying(self, left: list[State]) -> Denoiser:
        """Return the network whose evaluation i reads state i of the groups before, and appends the next to `left`."""

        def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            assert isinstance(condition, Text)
            before = self.states[len(left)] if self.states else None
            prediction, state = self._step(x, t, condition, before, self.next_group)
            left.append(state)
            return prediction

        return guided(network, self._text, self._null_text, self._guidance)
