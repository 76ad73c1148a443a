"""Plans: predicted memory and traffic against the real engine, advice against trying everything, and the report."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pomscale.base.errors import InputError
from pomscale.benchmarks.plan import deepspeed_recipe, make_recipe, measure, pretended_world
from pomscale.benchmarks.storage_tracker import StorageTracker
from pomscale.config.hardware import GPUS
from pomscale.config.load import load_train_recipe
from pomscale.config.mixer import PomMixer
from pomscale.config.train import TrainRecipe
from pomscale.data.loader import micro_batch_positions, num_micro_batches
from pomscale.distributed.world import join_world
from pomscale.engine.matrices import block_matrices
from pomscale.layers import PoM
from pomscale.models import make_model
from pomscale.ops.pom import BlockCausal
from pomscale.plan.advice import changed, cheapest_fit, room_for_more
from pomscale.plan.batch import BatchShare, batch_share
from pomscale.plan.memory import host_bytes, state_bytes, step_memory
from pomscale.plan.model_cost import forward_flops, num_parameters
from pomscale.plan.report import DatasetSize, plan, render
from pomscale.plan.shadow import mixers
from pomscale.plan.shadow.tensor import Leaf, Tape, backward
from pomscale.plan.speed import speed
from pomscale.plan.storage import storage
from pomscale.plan.traffic import traffic
from support.pairs import every_pair
from support.paths import RECIPES

TINY = {"size": "s-2", "depth": 4, "latent_shape": [4, 16, 16], "batch": 6}
TINY_MODEL = {"dim": 64, "num_heads": 4}
TINY_CLIPS = {"size": "s-2", "depth": 4, "latent_shape": [16, 8, 8, 12], "batch": 3}
TINY_VIDEO_MODEL = {**TINY_MODEL, "text_dim": 96}


def tiny(mixer: str = "dipom", num_ranks: int = 8, **changes: dict[str, Any]) -> TrainRecipe:
    return make_recipe(mixer, TINY, {"model": TINY_MODEL, **changes}, num_ranks)


def tiny_video(mixer: str = "vdipom", **changes: dict[str, Any]) -> TrainRecipe:
    return make_recipe(mixer, TINY_CLIPS, {**changes, "model": {**TINY_VIDEO_MODEL, **changes.get("model", {})}}, 8)


def assert_predicted(recipe: TrainRecipe, num_ranks: int, measured: tuple[int, int]) -> None:
    """The whole peak, and what the step adds to what is resident, of which more is left to chance."""
    (peak, resident), planned = measured, step_memory(recipe, num_ranks)
    assert planned.peak == pytest.approx(peak, rel=0.01), planned
    assert planned.peak - resident == pytest.approx(peak - resident, rel=0.02), planned
    assert sum(planned.by_part.values()) == planned.peak


# --- memory ----------------------------------------------------------------------------------------------------------


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
}


@pytest.mark.parametrize(("precision", "mode"), [("fp32", "none"), ("bf16", "none"), ("bf16", "full")])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_memory_of_other_trunks(trunk: str, precision: str, mode: str) -> None:
    recipe = tiny(
        model={**TINY_MODEL, **TRUNKS[trunk]}, compute={"precision": precision, "activation_checkpointing": mode}
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


# --- traffic ---------------------------------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensors of each kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("c10d.").split(".")[0]
        whole = {
            "_allgather_base_": 0,
            "_reduce_scatter_base_": 1,
            "allreduce_": 0,
            "alltoall_base_": 1,
        }
        if str(func).startswith("c10d.") and name in whole:
            tensor = args[whole[name]]
            tensors = tensor if isinstance(tensor, list) else [tensor]
            self.num_bytes[name] += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fsdp2": {"reshard_after_forward": False}, "compute": {"precision": "fp32"}},
        {"fsdp2": {"shard_size": 2}, "training": {"micro_batch": 2}},
    ],
    ids=["fsdp2", "kept gathered", "HSDP, micro-batches"],
)
def test_traffic_is_what_the_engine_sends(changes: dict[str, Any]) -> None:
    recipe = tiny(**changes)
    with pretended_world(8) as world, Collectives() as collectives:
        measure(recipe, world)
    shards = recipe.fsdp2.shard_size or 8
    sent = traffic(recipe, 8)
    steps = 2  # that `measure` takes
    others = (shards - 1) / shards
    # Shards are padded, and there are norms: a little more.
    assert collectives.num_bytes["_allgather_base_"] * others / steps == pytest.approx(
        sent["all-gather of weights"], rel=0.01
    )
    assert collectives.num_bytes["_reduce_scatter_base_"] * others / steps == pytest.approx(
        sent["reduce-scatter of gradients"], rel=0.01
    )
    if shards < 8:
        replicas = 8 // shards
        whole = collectives.num_bytes["allreduce_"] / steps
        assert 2 * whole * (replicas - 1) / replicas == pytest.approx(sent["all-reduce over replicas"], rel=0.01)


def test_traffic_of_muon_is_what_the_engine_sends() -> None:
    """Rank 0 owns the largest matrix of each round, so it sends somewhat more than the mean that is planned.

    Not with copies of the model: in the pretended world no rank may receive what it has no part of, as real ones may.
    """
    recipe = tiny(optimizer={"name": "muon"}, model={**TINY_MODEL, "depth": 8})
    with pretended_world(8) as world, Collectives() as collectives:
        measure(recipe, world)
    sent = collectives.num_bytes["alltoall_base_"] / 2 * 7 / 8  # in one of two steps, to others
    assert sent == pytest.approx(traffic(recipe, 8)["Muon's matrices"], rel=0.1)


SPLIT = {
    "pictures": tiny(mesh={"sp": 4}),
    "micro-batches, recomputed": tiny(
        mesh={"sp": 2}, training={"micro_batch": 2}, compute={"activation_checkpointing": "full"}
    ),
    "clips": tiny_video(mesh={"sp": 4}),
    "block-causal clips": tiny_video(mesh={"sp": 4}, model={"temporal": "block_causal"}),
    "a time per frame group": tiny_video(
        mesh={"sp": 4}, model={"temporal": "block_causal"}, diffusion={"time": {"per_frame_group": True}}
    ),
}


@pytest.mark.parametrize("recipe", SPLIT.values(), ids=SPLIT.keys())
def test_split_tokens_are_planned(recipe: TrainRecipe) -> None:
    """Bytes sent are exact; memory is that of rounded tokens."""
    with pretended_world(8) as world, Sums() as sums:
        peak, _ = measure(recipe, world)
    assert traffic(recipe, 8)["sums of tokens, over sp"] == round(sums.sent(recipe.mesh.sp) / 2)  # two steps
    planned = step_memory(recipe, 8)
    assert planned.peak == pytest.approx(peak, rel=0.03), planned
    whole = step_memory(changed(recipe, {"mesh.sp": 1}), 8, batch_share(recipe, 8))  # as many samples, all tokens
    texts = recipe.model.kind == "video"  # of which every rank has all
    # Mixers on a part of the tokens keep more of each than those that have all.
    assert planned.by_part["activations"] < (0.8 if texts else 1.5 / recipe.mesh.sp) * whole.by_part["activations"]


class Sums(TorchDispatchMode):
    """Bytes that each rank sends of sums of tokens, by ring algorithms."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("_c10d_functional."):
            self.num_bytes[str(func).split(".")[1]] += args[0].nbytes
        return func(*args, **(kwargs or {}))

    def sent(self, size: int) -> float:
        others = {"all_reduce": 2 * (size - 1) / size, "all_gather_into_tensor": size - 1}
        others |= {"reduce_scatter_tensor": (size - 1) / size, "wait_tensor": 0}
        return sum(num_bytes * others[name] for name, num_bytes in self.num_bytes.items())


# --- advice ----------------------------------------------------------------------------------------------------------


def fits(recipe: TrainRecipe, usable: float) -> bool:
    return step_memory(recipe, 8).peak <= usable


def largest_by_trying(recipe: TrainRecipe, usable: float) -> int:
    sizes = (batch_share(recipe, 8).micro_batch for recipe in _with_micro_batches(recipe) if fits(recipe, usable))
    return max(sizes, default=0)


def _with_micro_batches(recipe: TrainRecipe) -> list[TrainRecipe]:
    slice_ = recipe.training.global_batch // 8
    return [changed(recipe, {"training.micro_batch": size}) for size in range(1, slice_ + 1)]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.5, 0.9])
def test_the_largest_micro_batch_is_found(mode: str, share: float) -> None:
    recipe = tiny(training={"total_samples": 36000, "global_batch": 36 * 8}, compute={"activation_checkpointing": mode})
    usable = share * step_memory(recipe, 8).peak
    wanted = largest_by_trying(recipe, usable)
    found = cheapest_fit(recipe, 8, usable)
    if wanted >= 36 // 8:
        assert found is not None
        assert found.changes == {"training.micro_batch": wanted}
    if found is not None:
        assert fits(changed(recipe, found.changes), usable)
        assert found.memory == step_memory(changed(recipe, found.changes), 8)


def test_advice_climbs_from_the_cheap_to_the_dear() -> None:
    recipe = tiny(
        fsdp2={"shard_size": 2},
        model={**TINY_MODEL, "dim": 256},
        training={"global_batch": 64 * 8, "total_samples": 51200},
    )
    keys = []
    usable = step_memory(recipe, 8).peak - 1.0
    while (found := cheapest_fit(recipe, 8, usable)) is not None:
        keys.append(tuple(found.changes))
        usable = found.memory.peak * 0.9
    order = [key for i, key in enumerate(keys) if key not in keys[:i]]
    assert order[0] == ("training.micro_batch",)
    assert ("compute.activation_checkpointing", "training.micro_batch") in order
    assert order[-1][:3] == ("fsdp2.shard_size", "optimizer.moments", "fsdp2.cpu_offload")


def test_room_is_used_for_less_recomputation_then_for_larger_micro_batches() -> None:
    recipe = tiny(compute={"activation_checkpointing": "full"}, training={"micro_batch": 2})
    found = room_for_more(recipe, 8, 1e12)
    assert found is not None
    assert str(found) == "compute.activation_checkpointing=none"
    found = room_for_more(changed(recipe, found.changes), 8, 1e12)
    assert found is not None
    assert str(found) == "training.micro_batch=6"
    assert room_for_more(tiny(), 8, 1e12) is None


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("global_batch", "num_gpus", "micro_batch"), [(256, 8, None), (250, 8, 7), (250, 24, 4), (9, 8, 1)]
)
def test_batches_are_dealt_as_the_loader_does(global_batch: int, num_gpus: int, micro_batch: int | None) -> None:
    training = {"total_samples": global_batch, "global_batch": global_batch, "micro_batch": micro_batch}
    recipe = tiny(training=training)
    share = batch_share(recipe, num_gpus)
    assert share == batch_share(changed(recipe, {"mesh.sp": 3}), 3 * num_gpus)
    assert share.num_micro_batches == num_micro_batches(global_batch, num_gpus, micro_batch)
    largest = 0
    for rank in range(num_gpus):
        pieces = micro_batch_positions(
            0, global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=num_gpus
        )
        largest = max(largest, *(len(next(pieces)[0]) for _ in range(share.num_micro_batches)))
    assert share == BatchShare(largest, share.num_micro_batches)


def test_recomputation_costs_time_and_lowers_mfu() -> None:
    recipe = load_train_recipe(RECIPES / "image" / "dipom-xl-2.yaml")
    plain = speed(recipe, 16, GPUS["h100"], 0.4)
    assert plain.samples_per_s == pytest.approx(0.4 * 16 * 989e12 / (3 * 305e9), rel=0.01)
    again = speed(changed(recipe, {"compute.activation_checkpointing": "full"}), 16, GPUS["h100"], 0.4)
    assert plain.mfu == 0.4
    assert again.mfu == pytest.approx(0.3, rel=0.01)
    assert again.days(10**8) == pytest.approx(plain.days(10**8) * 4 / 3, rel=0.01)


def test_muon_takes_time_and_spares_memory() -> None:
    recipe = load_train_recipe(RECIPES / "image" / "dipom-b-2.yaml")
    muon = load_train_recipe(RECIPES / "image" / "dipom-b-2.yaml", ["optimizer.name=muon"])
    flops, batch = 3 * forward_flops(recipe.model), recipe.training.global_batch
    without, on_one, on_many = (speed(r, n, GPUS["h100"], 0.4) for r, n in ((recipe, 1), (muon, 1), (muon, 8)))
    assert without.optimizer_share == 0
    assert on_one.optimizer_share == pytest.approx(3.26e12 / (3.26e12 + batch * flops), rel=0.01)
    assert on_one.step_time_s == pytest.approx(without.step_time_s / (1 - on_one.optimizer_share))
    assert on_many.optimizer_share == pytest.approx(on_one.optimizer_share, rel=0.1)  # an eighth of both
    assert state_bytes(recipe) - state_bytes(muon) == 4 * num_matrix_elements(recipe)
    assert "Muon 3.26 TFLOP per step" in render(plan(muon, num_nodes=1, gpus_per_node=8, gpu="h100"))


def num_matrix_elements(recipe: TrainRecipe) -> int:
    with torch.device("meta"):
        network = make_model(recipe.model)
    return sum(network.get_parameter(name).numel() for name in block_matrices(network))


def test_storage_counts_what_is_kept() -> None:
    recipe = tiny(
        training={"total_samples": 48000, "global_batch": 48},
        checkpoint={"every_samples": 4800, "keep_last": 2, "keep_every_samples": 24000, "keep_best": 1},
        ema={"post_hoc": {"every_samples": 9600, "widths": [0.05, 0.1]}},
        validation={"path": "heldout", "every_samples": 4800},
    )
    parameters, disk = num_parameters(recipe.model), storage(recipe)
    assert (disk.num_checkpoints, disk.num_ema_snapshots) == (2 + 1 + 1 + 2, 5)
    assert disk.checkpoint == parameters * 4 * (1 + 2 + 3)
    assert disk.total == 6 * disk.checkpoint + 5 * 2 * 4 * parameters


def test_what_does_not_fit_together_is_refused_or_noted() -> None:
    def of(recipe: TrainRecipe, **machine: Any) -> Any:
        return plan(recipe, **{"num_nodes": 3, "gpus_per_node": 8, "gpu": "a100", **machine})

    with pytest.raises(InputError, match=r"fsdp2\.shard_size: 24 ranks do not make whole copies of 16"):
        of(tiny(fsdp2={"shard_size": 16}))
    with pytest.raises(InputError, match=r"training\.global_batch: 8 samples cannot be shared by 24 ranks"):
        of(tiny(training={"global_batch": 8, "total_samples": 80}))
    with pytest.raises(InputError, match=r"mesh\.sp: 24 ranks do not make whole groups of 5"):
        of(tiny(mesh={"sp": 5}))
    with pytest.raises(InputError, match=r"training\.global_batch: 3 samples cannot be shared by 6 groups of 4 ranks"):
        of(tiny(mesh={"sp": 4}, training={"global_batch": 3, "total_samples": 30}))
    with pytest.raises(InputError, match=r"compute\.float8: A100"):
        of(tiny(compute={"float8": True}))
    with pytest.raises(InputError, match="v100"):
        of(tiny(), gpu="v100")
    noted = of(tiny(training={"global_batch": 100, "total_samples": 1000}, fsdp2={"shard_size": 12})).notes
    assert [note.split(":")[0] for note in noted] == ["training.global_batch", "fsdp2.shard_size"]


def test_report_gives_the_nominal_flops_where_they_differ() -> None:
    for name, expected in (
        ("dipom-v2-xl-2", "191 GFLOP per sample and forward pass; 229 GFLOP nominal, with the output maps applied to"),
        ("dipom-xl-2", "305 GFLOP per sample and forward pass\n"),
    ):
        recipe = load_train_recipe(RECIPES / "image" / f"{name}.yaml")
        made = plan(recipe, num_nodes=1, gpus_per_node=2, gpu="h200")
        assert expected in render(made)
        flops = forward_flops(recipe.model)
        assert made.speed.samples_per_s == pytest.approx(0.4 * 2 * 989e12 / (3 * flops), rel=1e-3)


def test_report_is_a_table_that_ends_in_a_verdict() -> None:
    recipe = load_train_recipe(RECIPES / "image" / "dipom-xl-2-512.yaml", ["training.micro_batch=null"])
    made = plan(recipe, num_nodes=1, gpus_per_node=2, gpu="h100", dataset=DatasetSize(1_281_167, 40 * 2**30))
    text = render(made)
    lines = text.splitlines()
    assert not made.fits
    assert lines[-1].startswith("NO FIT    cheapest change that fits: training.micro_batch=")
    assert "833 M parameters" in text
    assert "1.28 M samples, 40.0 GiB, seen 79.9 times" in text
    assert all(len(line) <= 120 for line in lines)
    start, end = (next(i for i, line in enumerate(lines) if word in line) for word in ("memory  ", "peak per GPU"))
    table = [float(line[30:38]) for line in lines[start:end]]
    assert math.fsum(table) == pytest.approx(float(lines[end][30:38]), rel=0.01)
    assert float(lines[end][30:38]) == pytest.approx(made.memory.peak / 2**30, abs=0.01)
    larger = plan(recipe, num_nodes=8, gpus_per_node=8, gpu="h200")
    assert larger.fits
    assert render(larger).splitlines()[-1].startswith("FITS")


def test_report_of_clips() -> None:
    causal, forcing = (
        plan(load_train_recipe(RECIPES / "video" / f"{name}.yaml"), num_nodes=1, gpus_per_node=8, gpu="h200")
        for name in ("vdipom-xl-2-causal", "vdipom-xl-2-forcing")
    )
    assert "model     1.16 G parameters, 3600 tokens in 10 frame groups with 120 of text, 5.38 TFLOP" in render(causal)
    # A t for every frame group: so many times is the text modulated and projected.
    assert "5.62 TFLOP" in render(forcing)
    assert forcing.speed.samples_per_s < causal.speed.samples_per_s
    assert forcing.memory.peak > causal.memory.peak


# tests/unit/experiments/test_points.py plans the trainings of experiments.
_TRAININGS = [path for path in sorted(RECIPES.glob("[!dp]*/*.yaml")) if "kind: experiment" not in path.read_text()]


@pytest.mark.parametrize("recipe", _TRAININGS, ids=lambda path: path.stem)
def test_every_training_recipe_fits_on_a_node_of_h100s(recipe: Path) -> None:
    made = plan(load_train_recipe(recipe), num_nodes=1, gpus_per_node=8, gpu="h100")
    assert made.fits, render(made)


def test_planning_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from pomscale.config.load import load_train_recipe;"
        "from pomscale.plan.report import plan, render;"
        "render(plan(load_train_recipe(sys.argv[1]), num_nodes=1, gpus_per_node=8, gpu='h100'));"
        "print({'torch', 'numpy'} & set(sys.modules))"
    )
    recipe = RECIPES / "image" / "dipom-xl-2.yaml"
    done = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
