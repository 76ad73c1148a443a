"""Predicted memory against the storages of real steps of the engine, in every mode, layout and trunk."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from pomscale.benchmarks.plan import deepspeed_recipe, measure, pretended_world
from pomscale.benchmarks.storage_tracker import StorageTracker
from pomscale.config.mixer import PomMixer
from pomscale.config.train import TrainRecipe
from pomscale.distributed.world import join_world
from pomscale.layers import PoM
from pomscale.ops.pom import BlockCausal
from pomscale.plan.advice import changed
from pomscale.plan.memory import host_bytes, state_bytes, step_memory
from pomscale.plan.model_cost import num_parameters
from pomscale.plan.shadow import mixers
from pomscale.plan.shadow.tensor import Leaf, Tape, backward
from support.pairs import every_pair
from support.tiny_plans import TINY_MODEL, tiny, tiny_video


def assert_predicted(recipe: TrainRecipe, num_ranks: int, measured: tuple[int, int]) -> None:
    """The whole peak, and what the step adds to what is resident, of which more is left to chance."""
    (peak, resident), planned = measured, step_memory(recipe, num_ranks)
    assert planned.peak == pytest.approx(peak, rel=0.01), planned
    assert planned.peak - resident == pytest.approx(peak - resident, rel=0.02), planned
    assert sum(planned.by_part.values()) == planned.peak


def test_tracker_counts_storages_not_tensors() -> None:
    x = torch.zeros(1000)
    with StorageTracker([x]) as tracker:
        y = x + 1  # 4000 bytes beside x
        z = y.view(10, 100)[2:]
        del y
        assert tracker.live == 8000
        del z
        assert tracker.live == 4000
        x.untyped_storage().resize_(0)  # as FSDP frees weights
        torch.zeros(1)
    assert tracker.peak == 8000
    assert tracker.live == 0


def test_tracker_fails_where_it_has_not_noticed_a_change() -> None:
    x = torch.zeros(1000)
    with pytest.raises(RuntimeError, match="without an operator and without resize_"), StorageTracker([x]):
        super(torch.UntypedStorage, x.untyped_storage()).resize_(0)  # as code of torch in C++ would
    with StorageTracker([x]) as tracker:  # the watch over resize_ has ended with the block
        x.untyped_storage().resize_(4000)
    assert tracker.live == tracker.peak + 4000 == 4000


@pytest.mark.parametrize(
    ("mixer", "precision", "mode"),
    every_pair(["dipom", "dit"], ["fp32", "bf16"], ["none", "selective", "every-2", "every-3", "full"]),
)
def test_memory_of_every_mode(mixer: str, precision: str, mode: str) -> None:
    recipe = tiny(mixer, compute={"precision": precision, "activation_checkpointing": mode})
    with pretended_world(8) as world:
        assert_predicted(recipe, 8, measure(recipe, world))


LAYOUTS: dict[str, dict[str, Any]] = {
    "HSDP, micro-batches": {"fsdp2": {"shard_size": 2}, "training": {"micro_batch": 2}},
    "fp32 micro-batches": {"compute": {"precision": "fp32"}, "training": {"micro_batch": 2}},
    "kept gathered": {"fsdp2": {"reshard_after_forward": False}},
    "no prefetch": {"fsdp2": {"prefetch": 0}},
    "far prefetch": {"fsdp2": {"prefetch": 3}, "model": {**TINY_MODEL, "dim": 128}},
    "degree 3": {"model": {**TINY_MODEL, "degree": 3, "expand": 1, "ffn_expansion": 4}},
    "hybrid": {"model": {**TINY_MODEL, "mixer": ["pom", "attention"]}},
    "Muon": {"optimizer": {"name": "muon"}, "model": {**TINY_MODEL, "mixer": ["pom", "attention"], "degree": 3}},
    "bf16 moments, averages": {
        "optimizer": {"moments": "bf16"},
        "ema": {"halflives_samples": [10, 20], "post_hoc": {"every_samples": 100}},
        "model": {**TINY_MODEL, "num_classes": 200_000, "depth": 1},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_every_layout(layout: str) -> None:
    recipe = tiny(**LAYOUTS[layout])
    with pretended_world(8) as world:
        assert_predicted(recipe, 8, measure(recipe, world))


TIMES: dict[str, dict[str, Any]] = {
    "no mask": {},
    "block-causal": {"model": {"temporal": "block_causal"}},
    "t per frame group": {"model": {"temporal": "block_causal"}, "diffusion": {"time": {"per_frame_group": True}}},
}


COMPUTE = {
    "fp32": {"precision": "fp32", "activation_checkpointing": "none"},
    "bf16": {"precision": "bf16", "activation_checkpointing": "none"},
    "bf16-selective": {"precision": "bf16", "activation_checkpointing": "selective"},
    "bf16-full": {"precision": "bf16", "activation_checkpointing": "full"},
}


@pytest.mark.parametrize(("compute", "mixer", "times"), every_pair(COMPUTE, ["vdipom", "vdit"], TIMES))
def test_memory_of_clips(compute: dict[str, Any], mixer: str, times: dict[str, Any]) -> None:
    recipe = tiny_video(mixer, **times, compute=compute)
    with pretended_world(8) as world:
        assert_predicted(recipe, 8, measure(recipe, world))


def test_memory_of_a_hybrid_of_clips() -> None:
    model = {"mixer": ["pom", "attention"], "temporal": "block_causal", "patch_frames": 4, "degree": 3}
    recipe = tiny_video(model=model, fsdp2={"shard_size": 2}, training={"micro_batch": 2})
    with pretended_world(8) as world:
        assert_predicted(recipe, 8, measure(recipe, world))


V2 = {"kind": "pom", "form": "coefficients", "rope": True}


@pytest.mark.parametrize(
    ("mixer", "precision", "mode"),
    [
        ({**V2, "heads": 16}, "bf16", "none"),
        ({**V2, "heads": 16}, "fp32", "selective"),
        ({**V2, "heads": 16}, "bf16", "full"),
        ({**V2, "degree": 4, "expand": 3}, "fp32", "none"),
        ([{**V2, "heads": 8, "groups": 4, "rope": False}, "attention"], "bf16", "none"),
    ],
)
def test_memory_of_the_coefficient_form(mixer: Any, precision: str, mode: str) -> None:
    recipe = tiny(
        model={**TINY_MODEL, "mixer": mixer}, compute={"precision": precision, "activation_checkpointing": mode}
    )
    with pretended_world(8) as world:
        assert_predicted(recipe, 8, measure(recipe, world))


JIT = {
    "norm": "rms",
    "gates": "g",
    "ffn": "swiglu",
    "ffn_expansion": 4,
    "positions": "sincos_integer",
    "time_embedding": "data_fraction",
    "patch_embedding": {"bottleneck": 24},
}
ROTARY_ATTENTION = {"kind": "attention", "qk_norm": True, "rope": True}
TRUNKS: dict[str, dict[str, Any]] = {
    "JiT": {**JIT, "mixer": ROTARY_ATTENTION, "in_context": {"tokens": 5, "start": 1}},
    "JiT with PoM": {**JIT, "mixer": {**V2, "heads": 16}, "in_context": {"tokens": 5, "start": 1}},
    "rotary positions alone": {"positions": "none", "mixer": ROTARY_ATTENTION},
    "dropout": {"mixer": "attention", "ffn": "swiglu", "dropout": {"rate": 0.2, "first": 1, "last": 2}},
    "alignment": {"alignment": {"block": 2, "dim": 768, "hidden": 256}},  # so wide that its loss is at the peak
}
ALIGNED = {"diffusion": {"alignment": {"weight": 0.5}}, "data": {"path": "none", "features": "none"}}


@pytest.mark.parametrize(
    ("trunk", "precision", "mode"),
    [(trunk, *how) for trunk in TRUNKS for how in [("fp32", "none"), ("bf16", "none"), ("bf16", "full")]]
    + [("dropout", "fp32", "full"), ("alignment", "fp32", "full")],
)
def test_memory_of_other_trunks(trunk: str, precision: str, mode: str) -> None:
    recipe = tiny(
        model={**TINY_MODEL, **TRUNKS[trunk]},
        compute={"precision": precision, "activation_checkpointing": mode},
        **(ALIGNED if trunk == "alignment" else {}),
    )
    with pretended_world(8) as world:
        assert_predicted(recipe, 8, measure(recipe, world))


@pytest.mark.parametrize("mixer", [ROTARY_ATTENTION, {**V2, "heads": 8}], ids=["attention", "pom"])
def test_memory_of_clips_in_another_trunk(mixer: dict[str, Any]) -> None:
    recipe = tiny_video(model={**JIT, "mixer": mixer, "temporal": "block_causal"}, compute={"precision": "bf16"})
    with pretended_world(8) as world:
        assert_predicted(recipe, 8, measure(recipe, world))


@pytest.mark.parametrize("times", TIMES)
def test_memory_of_clips_in_the_coefficient_form(times: str) -> None:
    changes = {**TIMES[times], "model": {**TIMES[times].get("model", {}), "mixer": {**V2, "heads": 8, "groups": 2}}}
    recipe = tiny_video(**changes, compute={"precision": "bf16", "activation_checkpointing": "none"})
    with pretended_world(8) as world:
        assert_predicted(recipe, 8, measure(recipe, world))


@pytest.mark.parametrize(("heads", "num_frames"), [(32, 64), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_memory_of_an_output_map_that_is_folded(
    memory: Literal["fast", "lean"], dtype: torch.dtype, heads: int, num_frames: int
) -> None:
    """The map folded into many states, and its gradient, are larger than all that is kept of the tokens."""
    layer = PoM(64, 2, 2, form="coefficients", heads=heads).to(dtype)
    layer.mixer_memory = memory
    x = torch.randn(4, 256, 64, dtype=dtype).requires_grad_()
    with StorageTracker([x, *layer.parameters()]) as tracker:
        y = layer(x, mask=BlockCausal(256 // num_frames))
        y.backward(torch.ones_like(y))
    mixer, tape = mixers.PoM(64, PomMixer("coefficients", 2, 2, heads=heads)), Tape(dtype.itemsize)
    mixer.memory, mixer.block_rows = memory, 0 if dtype == torch.float32 else 64
    for weight in mixer.weights():
        weight.tensor = tape.new(weight.shape, part="parameters")
    tokens = tape.new(tuple(x.shape))
    tokens.node = Leaf()
    result = mixer(tokens, mask=num_frames)
    backward(result)  # held to the end, as y is
    assert tape.ledger.peak == pytest.approx(tracker.peak, rel=0.02)


def test_memory_of_one_real_rank() -> None:
    recipe = tiny(num_ranks=1)
    with join_world("cpu") as world:
        assert_predicted(recipe, 1, measure(recipe, world))


def test_offloading_the_optimizer_of_zero_1_is_another_optimizer_of_deepspeed() -> None:
    """Measured with DeepSpeed 0.19.8: sums beside the weights, the bucket, its copy, this rank's part."""
    planned = step_memory(deepspeed_recipe(1, offload=True), 8)
    assert planned.peak / 2**20 == pytest.approx(579.2, rel=0.01)
    assert {"optimizer", "ema"}.isdisjoint(planned.by_part)
    in_host_memory = host_bytes(deepspeed_recipe(1, offload=True), 8) - host_bytes(deepspeed_recipe(1), 8)
    assert in_host_memory == pytest.approx(
        (state_bytes(deepspeed_recipe(1)) + 6 * num_parameters(deepspeed_recipe(1).model)) / 8, rel=0.001
    )


def test_offloading_moves_the_state_to_the_host() -> None:
    here = tiny(compute={"activation_checkpointing": "full"})
    there = changed(here, {"fsdp2.cpu_offload": True})
    assert {"parameters", "optimizer", "ema"}.isdisjoint(step_memory(there, 8).by_part)
    moved = state_bytes(here) // 8 + num_parameters(here.model) * 4 // 8  # and the gradients
    assert host_bytes(there, 8) - host_bytes(here, 8) == pytest.approx(moved, abs=2)
