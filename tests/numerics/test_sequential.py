"""Clips drawn frame group by frame group, against drawing them all at once under the block-causal mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pomscale.base.condition import Condition, Text
from pomscale.benchmarks.storage_tracker import StorageTracker
from pomscale.config.names import SamplerName
from pomscale.diffusion.draws import sampling_noise, step_noise
from pomscale.diffusion.generate import generate
from pomscale.diffusion.guidance import Autoguided
from pomscale.diffusion.objectives import OBJECTIVES
from pomscale.diffusion.options import SamplingOptions
from pomscale.diffusion.samplers import SAMPLERS
from pomscale.diffusion.sequential import SequentialSampler
from pomscale.models import MixerState, VDiPoM
from pomscale.models.states import states_from_tensors, states_to_tensors
from pomscale.ops.pom import Context, Form, PomState, Queries, polynomial_mixer_step
from support.pairs import every_pair
from support.tiny_clips import V2, awaken, normal, text_of, video_config

LENGTHS, SEEDS, STEPS = [5, 2], [11, 12], 4
BATCH, GROUPS, SHAPE = 2, 4, (3, 2, 4, 6)  # c p H W of a frame group
TEXT, NULL = text_of(LENGTHS), text_of([1, 1], seed=3)
MIXERS: dict[str, Any] = {
    "pom": "pom",
    "attention": "attention",
    "hybrid": ["pom", "attention"],
    "coefficients": V2,
}

every_mixer = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS.keys())
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)
PRECISIONS = {"fp32": (torch.float32, 1e-5), "float64": (torch.float64, 1e-12)}


def evaluations(sampler: SamplerName | None) -> int:
    """Of the network in STEPS steps."""
    return {"heun": 2 * STEPS - 1, "midpoint": 2 * STEPS}.get(sampler or "", STEPS)


def build(mixer: Any = "pom", dtype: torch.dtype = torch.float32, scale: float = 0.1) -> VDiPoM:
    model = VDiPoM(video_config(mixer=mixer, temporal="block_causal"))
    awaken(model, scale=scale)
    return model.to(dtype).requires_grad_(False)


class Recorded:
    """A network that keeps what it was asked and what it said, whole clips or frame groups."""

    def __init__(self, model: VDiPoM) -> None:
        self.model = model
        self.asked: list[tuple[Tensor, Tensor, Text]] = []
        self.said: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, Text)
        self.asked.append((x, t, condition))
        self.said.append(self.model(x, t, condition))
        return self.said[-1]

    def step(
        self, x: Tensor, t: Tensor, condition: Text, states: list[MixerState] | None, group: int
    ) -> tuple[Tensor, list[MixerState]]:
        self.asked.append((x, t, condition))
        prediction, states = self.model.step(x, t, condition, states, group)
        self.said.append(prediction)
        return prediction, states


def stream(
    recorded: Recorded,
    *,
    time_per_group: bool = False,
    known: Tensor | None = None,
    objective: str = "flow",
    sampler: SamplerName | None = None,
    guidance: float = 0.0,
    guide: Recorded | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    clips = SequentialSampler(
        OBJECTIVES[objective](), recorded.step if guide is None else Autoguided(recorded.step, guide.step),
        SHAPE, TEXT, NULL, SEEDS, SamplingOptions(sampler, STEPS, guidance, **options), time_per_group=time_per_group,
    )  # fmt: skip
    given = iter(() if known is None else known.split(SHAPE[1], dim=2))
    while True:
        yield clips.advance(next(given, None))


def at_once(network: Any, objective: str, options: SamplingOptions, known: Tensor | None) -> Tensor:
    channels, frames, height, width = SHAPE
    shape = (channels, GROUPS * frames, height, width)
    noise, of_steps = sampling_noise(SEEDS, shape, TEXT, frames), step_noise(SEEDS, shape, TEXT, frames)
    return generate(OBJECTIVES[objective](), network, noise, TEXT, NULL, options, known=known, step_noise=of_steps)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, float(error)


# --- (a) one t for all frames ----------------------------------------------------------------------------------------


def check_equals_all_at_once(
    model: VDiPoM, objective: str, sampler: SamplerName | None, guidance: float, known: Tensor | None, tolerance: float
) -> None:
    """Every single prediction, and the clips."""
    one_by_one, together = Recorded(model), Recorded(model)
    groups = stream(one_by_one, objective=objective, sampler=sampler, guidance=guidance, known=known)
    clips = torch.cat([next(groups) for _ in range(GROUPS)], dim=2)
    expected = at_once(together, objective, SamplingOptions(sampler, STEPS, guidance), known)
    num_evaluations = evaluations(sampler)
    assert len(together.said) == num_evaluations
    assert len(one_by_one.said) == num_evaluations * GROUPS
    for i, prediction in enumerate(one_by_one.said):
        group, evaluation = divmod(i, num_evaluations)
        assert len(prediction) == (2 * BATCH if guidance else BATCH)
        assert_close(prediction, together.said[evaluation].split(SHAPE[1], 2)[group], tolerance)
    assert_close(clips, expected, tolerance)
    assert clips.shape == (BATCH, SHAPE[0], GROUPS * SHAPE[1], *SHAPE[2:])


@pytest.mark.parametrize(
    ("objective", "sampler", "guidance", "precision"),
    every_pair(list(OBJECTIVES), ["euler", "ddim", "heun"], [0.0, 1.5], PRECISIONS),
)
def test_form_a_equals_all_at_once(
    objective: str, sampler: SamplerName, guidance: float, precision: tuple[torch.dtype, float]
) -> None:
    dtype, tolerance = precision
    check_equals_all_at_once(build(dtype=dtype), objective, sampler, guidance, None, tolerance)


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "midpoint", "sde", "unipc"])
@every_objective
def test_form_a_of_every_other_sampler_equals_all_at_once(objective: str, sampler: SamplerName) -> None:
    check_equals_all_at_once(build(dtype=torch.float64), objective, sampler, 1.5, None, 1e-12)


@pytest.mark.parametrize(
    ("num_known", "mixer", "precision"),
    every_pair({"a picture": 1, "a group": 2, "two groups and a half": 5}, MIXERS, PRECISIONS),
)
def test_form_a_with_known_frames_equals_all_at_once(
    num_known: int, mixer: Any, precision: tuple[torch.dtype, float]
) -> None:
    dtype, tolerance = precision
    known = normal(BATCH, SHAPE[0], num_known, *SHAPE[2:], seed=7)
    for objective, sampler in (("flow", "heun"), ("eps", "ddim")):
        check_equals_all_at_once(build(mixer, dtype), objective, sampler, 1.5, known, tolerance)


# --- (b) a t of its own for every frame group ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known_and_guidance", "mixer", "precision"),
    every_pair([(0, 0.0), (0, 1.5), (1, 1.5), (4, 0.0), (5, 1.5)], MIXERS, PRECISIONS),
)
def test_form_b_equals_the_masked_forward_with_a_clean_past(
    known_and_guidance: tuple[int, float], mixer: Any, precision: tuple[torch.dtype, float]
) -> None:
    (num_known, guidance), (dtype, tolerance) = known_and_guidance, precision
    model = build(mixer, dtype)
    known = normal(BATCH, SHAPE[0], num_known, *SHAPE[2:], seed=7) if num_known else None
    for objective, sampler in (("flow", "heun"), ("eps", "ddim")):
        recorded = Recorded(model)
        groups = stream(
            recorded, time_per_group=True, objective=objective, sampler=sampler, guidance=guidance, known=known
        )
        past: list[Tensor] = []
        for number in range(GROUPS):
            already = len(recorded.said)
            group = next(groups)
            asked = recorded.asked[already:]
            is_given = (number + 1) * SHAPE[1] <= num_known
            num_evaluations = 0 if is_given else evaluations(sampler)
            assert len(asked) == num_evaluations + 1
            clean, zero, _ = asked[-1]  # what is left for the groups to come
            assert torch.equal(clean, torch.cat([group, group]) if guidance else group)
            assert not zero.any()
            for (x, t, condition), prediction in zip(asked, recorded.said[already:], strict=True):
                times = torch.cat([t.new_zeros(len(t), number), t[:, None]], dim=1)
                whole = model(torch.cat([*past, x], dim=2), times, condition)
                assert_close(prediction, whole[:, :, number * SHAPE[1] :], tolerance)
            past.append(clean)


# --- known frames ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time_per_group", [False, True], ids=["form a", "form b"])
def test_known_frames_come_back_as_they_are_and_lead_the_others(time_per_group: bool) -> None:
    known = normal(BATCH, SHAPE[0], 3, *SHAPE[2:], seed=7)
    clips = []
    for given in (known, known + 1):
        groups = stream(Recorded(build()), time_per_group=time_per_group, known=given)
        clips.append(torch.cat([next(groups) for _ in range(3)], dim=2))
        assert torch.equal(clips[-1][:, :, :3], given)
    assert not torch.allclose(clips[0][:, :, 3:4], clips[1][:, :, 3:4]), "the rest of the same frame group"
    assert not torch.allclose(clips[0][:, :, 4:], clips[1][:, :, 4:])


@every_objective
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_frames_are_noised_as_in_training(objective: str, sampler: SamplerName) -> None:
    """What the network sees of them is on their own path, at every evaluation, also of a network without a mask."""
    path = OBJECTIVES[objective]()
    known = normal(BATCH, SHAPE[0], 3, *SHAPE[2:], seed=7)
    model = VDiPoM(video_config(temporal="none")).requires_grad_(False)
    awaken(model, scale=0.1)
    recorded = Recorded(model)
    clips = at_once(recorded, objective, SamplingOptions(sampler, STEPS, 1.5), known)
    assert torch.equal(clips[:, :, :3], known)
    eps = sampling_noise(SEEDS, (SHAPE[0], GROUPS * SHAPE[1], *SHAPE[2:]), TEXT, group_frames=SHAPE[1])[:, :, :3]
    for x, t, _ in recorded.asked:
        expected = path.alpha(t[0]) * known + path.sigma(t[0]) * eps
        torch.testing.assert_close(x[:, :, :3], torch.cat([expected, expected]), rtol=1e-5, atol=1e-5)


# --- guidance that is not the same in all evaluations ----------------------------------------------------------------

INTERVAL: dict[str, Any] = {"guidance": 1.5, "guidance_interval": (0.3, 0.8)}

with_and_without_a_guide = pytest.mark.parametrize("with_guide", [False, True], ids=["interval", "interval and guide"])


def batches(recorded: Recorded) -> list[int]:
    """Batch of each evaluation, in batches of clips."""
    return [len(x) // BATCH for x, _, _ in recorded.asked]


@pytest.mark.parametrize("sampler", ["heun", "sde", "unipc"])
@every_objective
@with_and_without_a_guide
def test_form_a_with_an_interval_equals_all_at_once(with_guide: bool, objective: str, sampler: SamplerName) -> None:
    model, weak = (build(dtype=torch.float64, scale=scale) for scale in (0.1, 0.07))
    one_by_one, together, guide = Recorded(model), Recorded(model), Recorded(weak)
    groups = stream(one_by_one, objective=objective, sampler=sampler, guide=guide if with_guide else None, **INTERVAL)
    clips = torch.cat([next(groups) for _ in range(GROUPS)], dim=2)
    network: Any = Autoguided(together, weak) if with_guide else together
    expected = at_once(network, objective, SamplingOptions(sampler, STEPS, **INTERVAL), None)
    assert_close(clips, expected, 1e-12)
    assert batches(one_by_one) == batches(together) * GROUPS
    assert set(batches(together)) == ({1} if with_guide else {1, 2})
    if with_guide:
        assert 0 < len(guide.asked) < len(one_by_one.asked)


@with_and_without_a_guide
@every_mixer
def test_form_b_with_an_interval_equals_the_masked_forward_with_a_clean_past(mixer: Any, with_guide: bool) -> None:
    """Each of both predictions carries a state of its own, so that an evaluation without guidance costs half."""
    model, weak = (build(mixer, torch.float64, scale=scale) for scale in (0.1, 0.07))
    recorded, guide = Recorded(model), Recorded(weak)
    groups = stream(recorded, time_per_group=True, guide=guide if with_guide else None, **INTERVAL)
    past: list[Tensor] = []
    for number in range(3):

        def masked(network: VDiPoM, x: Tensor, t: Tensor, text: Text, number: int = number) -> Tensor:
            times = torch.cat([t.new_zeros(len(t), number), t[:, None]], dim=1)
            return network(torch.cat([*past, x], dim=2), times, text)[:, :, number * SHAPE[1] :]

        def denoise(x: Tensor, t: Tensor, masked: Any = masked) -> Tensor:
            good = masked(model, x, t, TEXT)
            if not 0.3 < float(t[0]) < 0.8:
                return good
            return good + 1.5 * (good - (masked(weak, x, t, TEXT) if with_guide else masked(model, x, t, NULL)))

        flow = OBJECTIVES["flow"]()
        noise = sampling_noise(SEEDS, SHAPE, TEXT, SHAPE[1], first_group=number)
        expected = SAMPLERS["euler"](flow, denoise, noise, flow.time_grid(STEPS).float())
        found = next(groups)
        assert_close(found, expected, 1e-12)
        past.append(found)
    assert set(batches(recorded)) == {1}
    # A group has 4 evaluations, at 1, 0.75, 0.5 and 0.25, two of them with guidance, and one at 0 for each prediction.
    assert len(recorded.asked) == 3 * (4 + 1 if with_guide else 4 + 2 + 2)
    assert len(guide.asked) == (3 * (2 + 1) if with_guide else 0)


# --- the state -------------------------------------------------------------------------------------------------------


def stored_bytes(states: list[list[MixerState]]) -> int:
    """Of the memory behind the tensors: a view of a large one would count in full."""
    tensors = [tensor for of_blocks in states for tensor in states_to_tensors(of_blocks).values()]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("time_per_group", [False, True], ids=["form a", "form b"])
@pytest.mark.parametrize("mixer", ["pom", "attention"])
def test_only_attention_carries_more_and_more(mixer: str, time_per_group: bool) -> None:
    """The state after 2 frame groups and after 50, and the most memory that making a group takes."""
    model = build(mixer)
    clips = SequentialSampler(
        OBJECTIVES["flow"](), model.step, SHAPE, TEXT, NULL, SEEDS,
        SamplingOptions(num_steps=2, guidance=1.0), time_per_group=time_per_group,
    )  # fmt: skip
    sizes, peaks = [], []
    for number in range(51):
        if number not in (2, 50):
            clips.advance()
            continue
        states = [tensor for of_blocks in clips.states for tensor in states_to_tensors(of_blocks).values()]
        with StorageTracker([*model.parameters(), *states]) as tracker:
            clips.advance()
        sizes.append(stored_bytes(clips.states))
        peaks.append(tracker.peak)
    assert len(clips.states) == (1 if time_per_group else 2)
    if mixer == "pom":
        assert sizes[0] == sizes[1] == 2 * BATCH * len(clips.states) * 2 * (64 * 4 + 8)  # two blocks: kD fp32, count
        assert peaks[0] == peaks[1]
    else:
        assert sizes[1] > 10 * sizes[0]
        assert peaks[1] > peaks[0]


def test_nothing_that_was_made_needs_a_gradient() -> None:
    model = build().requires_grad_()
    clips = SequentialSampler(
        OBJECTIVES["flow"](), model.step, SHAPE, TEXT, NULL, SEEDS, SamplingOptions(num_steps=2), time_per_group=True
    )  # fmt: skip
    assert not clips.advance().requires_grad
    assert not any(tensor.requires_grad for tensor in states_to_tensors(clips.states[0]).values())


def test_an_interrupted_frame_group_leaves_the_state_of_those_before() -> None:
    """Ctrl-C in the middle of a group, then a save: the state belongs to `next_group`."""
    model, calls = build(), 0

    def step(*arguments: Any) -> tuple[Tensor, list[MixerState]]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return model.step(*arguments)

    stopped, whole = (
        SequentialSampler(
            OBJECTIVES["flow"](), one, SHAPE, TEXT, NULL, SEEDS, SamplingOptions(num_steps=3), time_per_group=False
        )
        for one in (step, model.step)
    )
    stopped.advance()
    with pytest.raises(KeyboardInterrupt):
        stopped.advance()
    assert stopped.next_group == 1
    whole.advance()
    assert torch.equal(stopped.advance(), whole.advance())


@every_mixer
def test_states_survive_as_plain_tensors(mixer: Any) -> None:
    model = build(mixer)
    _, states = model.step(normal(BATCH, *SHAPE), torch.full((BATCH,), 0.5), TEXT, None, 0)
    again = states_from_tensors(model.config, states_to_tensors(states))
    assert [type(state) for state in again] == [type(state) for state in states]
    x, t = normal(BATCH, *SHAPE, seed=1), torch.full((BATCH,), 0.5)
    assert torch.equal(model.step(x, t, TEXT, again, 1)[0], model.step(x, t, TEXT, states, 1)[0])


def states_of(mixer: Any) -> list[MixerState]:
    return build(mixer).step(normal(BATCH, *SHAPE), torch.full((BATCH,), 0.5), TEXT, None, 0)[1]


@pytest.mark.parametrize(
    ("mixer", "of", "message"),
    [
        (V2, "pom", r"state of block 0: expected a sum \(b 32\), got \(2, 64\)"),
        ("pom", V2, r"state of block 0: expected a sum \(b 64\), got \(2, 32\)"),
        ("attention", {"kind": "attention", "heads": 4}, r"block 0: expected keys \(b 2 n 8\), got \(2, 4, 6, 4\)"),
        ("pom", ["pom", "attention"], r"block 1: expected \['1.count', '1.sum'\], got"),
    ],
)
def test_the_states_of_another_network_are_refused(mixer: Any, of: Any, message: str) -> None:
    model, states = build(mixer), states_of(of)
    with pytest.raises(ValueError, match=message):
        states_from_tensors(model.config, states_to_tensors(states))
    if of != {"kind": "attention", "heads": 4}:
        with pytest.raises(ValueError, match="step: "):
            model.step(normal(BATCH, *SHAPE), torch.full((BATCH,), 0.5), TEXT, states, 1)


def test_the_states_of_more_blocks_are_refused() -> None:
    tensors = states_to_tensors([*states_of(V2), *states_of(V2)])
    with pytest.raises(ValueError, match=r"states: expected those of 2 blocks, got also \['2.count'"):
        states_from_tensors(build(V2).config, tensors)


@pytest.mark.parametrize("offset", [0.0, 1.5], ids=["sums near zero", "sums that grow"])
def test_fp32_sums_are_exact_enough_after_a_thousand_frame_groups(offset: float) -> None:
    """The mean that queries read, against sums in float64: the rounding of 1,000 additions stays below 1e-6 of it."""
    single: PomState | None = None
    double: PomState | None = None
    generator, form = torch.Generator().manual_seed(0), Form()
    for _ in range(1000):
        u = torch.randn(2, 16, 32, generator=generator) + offset
        gate = torch.zeros_like(u)
        _, single = polynomial_mixer_step(Context(u, form), Queries(gate), single)
        _, double = polynomial_mixer_step(Context(u.double(), form), Queries(gate.double()), double)
    assert single is not None
    assert double is not None
    assert_close(single.mean(), double.mean(), 1e-6)
