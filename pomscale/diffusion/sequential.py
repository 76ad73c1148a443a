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
from pomscale.diffusion.draws import sampling_noise, step_noise
from pomscale.diffusion.generate import draw_latents
from pomscale.diffusion.guidance import Autoguided, guidance_weight, guided
from pomscale.diffusion.objectives import Network, Objective
from pomscale.diffusion.options import SamplingOptions

State = TypeVar("State")
"""State of the network after some frame groups, of any type."""

Step = Callable[[Tensor, Tensor, Text, State | None, int], tuple[Tensor, State]]
"""(latents (b c p H W), t (b,), text, state of the groups before or None, number of the group) ->
prediction (b c p H W), state of the groups up to this one. The given state is not changed."""


class SequentialSampler(Generic[State]):
    """Samples b clips frame group by frame group. `states`, `worse_states` and `next_group` hold the whole past.

    Attributes:
        states: One state for each network evaluation of the sampler in form (a), one in form (b), none before the first
            group. They only change between two groups, so at any other time they belong to `next_group`.
        worse_states: The same of the prediction that guidance leads away from, where it is evaluated for itself: by a
            guide, and in form (b) where guidance is not on in all evaluations. Elsewhere there are none, and with
            guidance `states` belong to a batch of 2b.
        next_group: Number of the frame group that `advance` samples next.
    """

    def __init__(
        self,
        objective: Objective,
        step: Step[State] | Autoguided[Step[State]],
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
            step: The network, perhaps with a guide.
            group_shape: (c p H W) of a frame group.
            text: Texts of the b clips.
            null_text: b texts that say nothing, for guidance.
            seeds: One seed per clip.
            options: Sampler, steps and guidance.
            time_per_group: Whether the network was trained with a t per frame group: form (b), else form (a).

        Raises:
            InputError: The options do not fit the objective.
        """
        self.states: list[State] = []
        self.worse_states: list[State] = []
        self.next_group = 0
        self._objective = objective
        self._group_shape = group_shape
        self._text = text
        self._null_text = null_text
        self._seeds = seeds
        self._time_per_group = time_per_group
        self._options = options.resolved(objective.name)
        height, width = group_shape[-2:]
        self._weight = guidance_weight(self._options, (height, width))
        self._worse: tuple[Step[State], Text] | None = None
        if isinstance(step, Autoguided):
            self._step, self._worse = step.network, (step.guide, text)
        else:
            self._step = step
            if time_per_group and callable(self._weight):
                # An evaluation of form (b) reads the state that the clean groups have left, whose batch is one for all.
                self._worse = (step, null_text)

    @torch.no_grad()
    def advance(self, known: Tensor | None = None) -> Tensor:
        """Return the next frame group, normalised latents (b c p H W) fp32.

        Args:
            known: (b c f H W), f <= p, the first f frames of the group where they are given.
        """
        states: list[State] = []
        worse_states: list[State] = []
        carrying = self._network(states, worse_states)
        group_frames = self._group_shape[1]
        noise = sampling_noise(self._seeds, self._group_shape, self._text, group_frames, first_group=self.next_group)
        known = None if known is None else known.to(noise)
        if not self._time_per_group:
            latents = self._draw(carrying, noise, known)
        else:
            if known is not None and known.shape[2] == group_frames:
                latents = known
            else:
                latents = self._draw(self._network(), noise, known)
            # All states are left, whether or not guidance is on at t = 0.
            weight = 0.0 if self._weight == 0 else 1.0
            leave = guided(carrying, self._text, self._null_text, weight)
            leave(latents, latents.new_zeros(len(latents)))
        self.states, self.worse_states = states, worse_states
        self.next_group += 1
        return latents

    def _draw(self, network: Network | Autoguided[Network], noise: Tensor, known: Tensor | None) -> Tensor:
        denoise = guided(network, self._text, self._null_text, self._weight)
        of_steps = step_noise(self._seeds, self._group_shape, self._text, self._group_shape[1], self.next_group)
        return draw_latents(self._objective, denoise, noise, self._options, known=known, step_noise=of_steps)

    def _network(
        self, left: list[State] | None = None, worse_left: list[State] | None = None
    ) -> Network | Autoguided[Network]:
        """Return the network at the next frame group: reading one state and leaving none, or leaving its states."""
        main = _after(self.states, self._step, self.next_group, left)
        if self._worse is None:
            return main
        step, text = self._worse
        worse = _after(self.worse_states, step, self.next_group, worse_left)
        return Autoguided(main, lambda x, t, _: worse(x, t, text))


def _after(before: list[State], step: Step[State], group: int, left: list[State] | None) -> Network:
    """Return the network after the groups that left the states `before`.

    With `left`, its evaluation i reads state i of them, and appends the next to `left`. Else it reads their one state.
    """

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, Text)
        state = before[0 if left is None else len(left)] if before else None
        prediction, after = step(x, t, condition, state, group)
        if left is not None:
            left.append(after)
        return prediction

    return network
