"""One rank of test_engine.py: Fsdp2Engine, in several settings, against a plain loop that knows nothing of shards."""

from __future__ import annotations

import copy
import math
import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pomscale.config.block import AlignmentConfig
from pomscale.config.engine import ComputeConfig, Fsdp2Config, OptimizerConfig
from pomscale.config.model import ImageModelConfig
from pomscale.diffusion.alignment import alignment_loss
from pomscale.distributed.world import World, join_world
from pomscale.engine.fsdp2 import Fsdp2Engine
from pomscale.engine.optimizers import build_optimizer
from pomscale.models import DiPoM, init_weights

MODEL = ImageModelConfig(
    latent_shape=(4, 4, 4),
    num_classes=3,
    patch_size=1,
    dim=20,
    depth=3,
    num_heads=2,
    mixer=["pom", "attention", {"kind": "pom", "form": "coefficients", "heads": 4, "groups": 2, "rope": True}],
    alignment=AlignmentConfig(block=2, dim=7, hidden=12),
)
ALIGNED_UNTIL = 23
"""Global position up to which samples have the alignment loss: in the third step some ranks have some of them."""
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, grad_clip=0.05)
GLOBAL_BATCH, NUM_STEPS = 9, 5
EMA_WEIGHTS = {"slow": 0.1, "fast": 0.3}


def batch(step: int) -> tuple[Tensor, ...]:
    """Latents, times, classes, target, features and global positions of a step."""
    generator = torch.Generator().manual_seed(step)
    x, target = torch.randn(2, GLOBAL_BATCH, *MODEL.latent_shape, generator=generator)
    features = torch.randn(GLOBAL_BATCH, MODEL.num_tokens, 7, generator=generator)
    positions = step * GLOBAL_BATCH + torch.arange(GLOBAL_BATCH)
    return x, torch.rand(GLOBAL_BATCH, generator=generator), torch.arange(GLOBAL_BATCH) % 4, target, features, positions


def share(model: nn.Module, part: tuple[Tensor, ...]) -> Tensor:
    x, t, condition, target, features, positions = part
    num_aligned = int((positions < ALIGNED_UNTIL).sum())
    prediction, projected = model(x, t, condition, num_aligned=num_aligned)
    losses = (prediction - target).square().flatten(1).mean(1)
    return (losses.sum() + 0.5 * alignment_loss(projected, features[:num_aligned]).sum()) / GLOBAL_BATCH


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def initialise(model: nn.Module, assign: object) -> None:
    init_weights(model, 7, assign)  # type: ignore[arg-type]


def engines(world_size: int) -> list[dict[str, Any]]:
    """Options of the engines that are compared on `world_size` ranks."""
    if world_size == 4:
        return [{}, {"fsdp2": Fsdp2Config(shard_size=2, prefetch=2)}]
    return [
        {},
        {"fsdp2": Fsdp2Config(reshard_after_forward=False, prefetch=0, cpu_offload=True)},
        {"compute": ComputeConfig(precision="fp32", activation_checkpointing="selective")},
    ]


def compare(world: World, **options: Any) -> None:
    plain = DiPoM(MODEL)
    init_weights(plain, 7)
    with torch.device("meta"):
        model = DiPoM(MODEL)
    defaults = {"fsdp2": Fsdp2Config(), "compute": ComputeConfig(precision="fp32"), "optimizer": OPTIMIZER}
    engine = Fsdp2Engine(model, initialise, world, averages=list(EMA_WEIGHTS), **{**defaults, **options})
    for name, parameter in engine.state_dict()["model"].items():
        assert full(parameter).equal(plain.get_parameter(name)), f"{name}: another initial weight"

    optimizer = build_optimizer(plain, OPTIMIZER)
    averages = {name: copy.deepcopy(plain) for name in EMA_WEIGHTS}
    for step in range(NUM_STEPS):
        # Two micro-batches per rank, of unequal sizes where the ranks do not divide the batch.
        begin, end = (GLOBAL_BATCH * r // world.size for r in (world.rank, world.rank + 1))
        middle = (begin + end) // 2 if end - begin > 1 else end
        parts = [tuple(value[a:b] for value in batch(step)) for a, b in ((begin, middle), (middle, end)) if b > a]
        (loss,) = world.sum([engine.forward_backward(parts, share)])
        norm = engine.step(OPTIMIZER.lr / (step + 1), EMA_WEIGHTS)

        expected = share(plain, batch(step))
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.lr / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in EMA_WEIGHTS.items():
                for mean, parameter in zip(averages[average].parameters(), plain.parameters(), strict=True):
                    mean.lerp_(parameter, weight)
        torch.testing.assert_close(loss, expected.item(), rtol=1e-5, atol=0)
        torch.testing.assert_close(norm, expected_norm.item(), rtol=1e-4, atol=0)

    state = engine.state_dict()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(full(state["model"][name]), parameter.detach(), rtol=1e-3, atol=2e-5)
        for average, module in averages.items():
            mean = module.get_parameter(name).detach()
            torch.testing.assert_close(full(state["ema"][average][name]), mean, rtol=1e-3, atol=2e-5)

    check_replicas(engine, world, options)
    check_swap(engine)
    check_not_finite(engine, parts)


def check_replicas(engine: Fsdp2Engine, world: World, options: dict[str, Any]) -> None:
    """With HSDP, copies lie on several ranks, and are the same to the bit."""
    replicas = engine.replicas()
    sharded_over = options.get("fsdp2", Fsdp2Config()).shard_size or world.size
    assert (replicas is not None) == (sharded_over < world.size)
    if replicas is not None:
        held: list[Any] = [None] * (world.size // sharded_over)
        dist.all_gather_object(held, dict(replicas.tensors), group=replicas.group)
        assert len(held) == 2
        assert all(value.equal(held[1][name]) for name, value in held[0].items())
    num_parameters = sum(p.numel() for p in DiPoM(MODEL).parameters())
    resident = engine.resident_bytes()
    # Ranks hold about a share each; FSDP pads what does not divide.
    assert num_parameters * 4 / sharded_over * 0.9 < resident["parameters"] < num_parameters * 4 / sharded_over * 1.6
    assert resident["ema"] == pytest.approx(2 * resident["parameters"], rel=0.2)
    assert resident["optimizer"] == pytest.approx(2 * resident["parameters"], rel=0.2)


def check_swap(engine: Fsdp2Engine) -> None:
    """Within the block the model computes with the averages; after it, to the bit, as before."""
    x, t, condition, *_ = batch(99)
    before = {name: full(p).clone() for name, p in engine.state_dict()["model"].items()}
    averages = {name: full(p).clone() for name, p in engine.state_dict()["ema"]["fast"].items()}
    reference = DiPoM(MODEL)
    with torch.no_grad():
        trained = engine.model(x, t, condition)
        with engine.averaged("fast"):
            averaged = engine.model(x, t, condition)
        again = engine.model(x, t, condition)
        for name, value in averages.items():
            reference.get_parameter(name).copy_(value)
        torch.testing.assert_close(averaged, reference(x, t, condition))
    assert again.equal(trained)
    assert not again.equal(averaged)
    assert all(full(p).equal(before[name]) for name, p in engine.state_dict()["model"].items())
    assert all(full(p).equal(averages[name]) for name, p in engine.state_dict()["ema"]["fast"].items())


def check_not_finite(engine: Fsdp2Engine, parts: list[tuple[Tensor, ...]]) -> None:
    """A step with a gradient that is not finite changes nothing."""
    before = {name: full(p).clone() for name, p in engine.state_dict()["model"].items()}
    engine.forward_backward(parts, lambda model, part: share(model, part) * float("nan"))
    norm = engine.step(1.0, dict.fromkeys(EMA_WEIGHTS, 1.0))
    assert math.isnan(norm)
    assert all(full(p).equal(before[name]) for name, p in engine.state_dict()["model"].items())


if __name__ == "__main__":
    warnings.simplefilter("error")  # FSDP warns of mistakes that only corrupt gradients
    with join_world("cpu") as world:
        for options in engines(world.size):
            compare(world, **options)
        print("engine equals plain loop", flush=True)
    os._exit(0)  # as the command line does, and for its reason
