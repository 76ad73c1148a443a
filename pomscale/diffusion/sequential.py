"""Clips frame group by frame group: the past is a carried state, and what is made is never looked at again.

The network needs the block-causal mask, and predicts a frame group from the state that the groups before it have left.
What is carried depends on what the network was trained for. Both forms are exact:

    (a) one t for all frames. While a group is denoised, the groups before it pass through the same noise levels. So
        there is a state for each network evaluation of the sampler: evaluation i of a group continues what evaluation i
        of the group before has left. The clip is the one that sampling all frames at once gives.
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
from pomscale.diffusion.guidance import guided
from pomscale.diffusion.known import sample_after
from pomscale.diffusion.noise import sampling_noise
from pomscale.diffusion.objectives import Objective
from pomscale.diffusion.samplers import DEFAULT_SAMPLER, SAMPLERS
from pomscale.diffusion.samplers.types import Denoiser

State = TypeVar("State")
"""What the network carries of the groups before; what it is made of is the network's business."""

Step = Callable[[Tensor, Tensor, Text, State | None, int], tuple[Tensor, State]]
"""(latents (b c p H W), t (b,), text, state of the groups before or None, number of the group) ->
prediction (b c p H W), state of the groups up to this one. Leaves the state that it was given as it was."""


class SequentialSampler(Generic[State]):
    """b clips, drawn frame group by frame group. `states` and `next_group` are all that there is of the past.

    states: (a) one for each network evaluation of the sampler, (b) one; none before the first group. With guidance they
    are of a batch of 2b. They only change between two groups, so at any other time they belong to `next_group`.
    """

    def __init__(
        self,
        objective: Objective,
        step: Step[State],
        group_shape: tuple[int, int, int, int],
        text: Text,
        null_text: Text,
        seeds: Sequence[int],
        *,
        time_per_group: bool,
        sampler: str | None = None,
        num_steps: int = 50,
        guidance: float = 0.0,
    ) -> None:
        """group_shape (c p H W); text, null_text: of b clips; time_per_group: form (b); the rest as in `generate`."""
        self.states: list[State] = []
        self.next_group = 0
        self._objective = objective
        self._step = step
        self._group_shape = group_shape
        self._text = text
        self._null_text = null_text
        self._seeds = seeds
        self._time_per_group = time_per_group
        self._sample = SAMPLERS[sampler or DEFAULT_SAMPLER[objective.name]]
        self._times = objective.time_grid(num_steps).float()
        self._guidance = guidance

    @torch.no_grad()
    def advance(self, known: Tensor | None = None) -> Tensor:
        """The next frame group, normalised latents (b c p H W) fp32.

        known (b c f H W), f <= p: the first f frames of the group, which are given.
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
        """Reads the one state of the groups before, and leaves none."""
        state = self.states[0] if self.states else None

        def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            assert isinstance(condition, Text)
            return self._step(x, t, condition, state, self.next_group)[0]

        return guided(network, self._text, self._null_text, self._guidance)

    def _carrying(self, left: list[State]) -> Denoiser:
        """Evaluation i reads state i of the groups before, and appends to `left` what is to be the next state i."""

        def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            assert isinstance(condition, Text)
            before = self.states[len(left)] if self.states else None
            prediction, state = self._step(x, t, condition, before, self.next_group)
            left.append(state)
            return prediction

        return guided(network, self._text, self._null_text, self._guidance)
