"""Predicted traffic against what the real engine sends, and the memory of ranks that share tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from pomscale.benchmarks.plan import measure, pretended_world
from pomscale.config.train import TrainRecipe
from pomscale.plan.advice import changed
from pomscale.plan.batch import batch_share
from pomscale.plan.memory import step_memory
from pomscale.plan.traffic import traffic
from support.tiny_plans import TINY_MODEL, TINY_VIDEO_MODEL, tiny, tiny_video


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
    "pictures of a text": tiny(mesh={"sp": 2}, model={**TINY_VIDEO_MODEL, "num_classes": None}),
    "texts in context": tiny(
        mesh={"sp": 2}, model={**TINY_VIDEO_MODEL, "num_classes": None, "text": "in_context", "text_start": 1}
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
    if recipe.model.context_start is None:  # tokens in context are on the first rank, as many as the picture's here
        texts = recipe.model.text_dim is not None  # of which every rank has all
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
