"""One rank of test_deepspeed.py: DeepSpeedEngine against a plain loop that knows nothing of shards.

deepspeed_worker.py train FOLDER     settings from the start; ZeRO 2 saves to FOLDER half way
deepspeed_worker.py all FOLDER       every setting, likewise
deepspeed_worker.py go-on FOLDER     what is in FOLDER is loaded by other engines, and saved again by the last
"""

from __future__ import annotations

import copy
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pomscale.base.errors import InputError
from pomscale.config.block import AlignmentConfig
from pomscale.config.engine import ComputeConfig, DeepSpeedConfig, Fsdp2Config, OptimizerConfig
from pomscale.config.model import ImageModelConfig
from pomscale.diffusion.alignment import alignment_loss
from pomscale.distributed.flat_shard import FlatShard
from pomscale.distributed.world import World, join_world
from pomscale.engine.deepspeed import DeepSpeedEngine
from pomscale.engine.fsdp2 import Fsdp2Engine
from pomscale.engine.optimizers import build_optimizer
from pomscale.engine.protocol import Engine
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
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, grad_clip=0.05)  # every step is clipped
GLOBAL_BATCH, NUM_STEPS, HALF_WAY = 9, 4, 2  # no micro-batch of up to four ranks is empty
EMA_WEIGHTS = {"slow": 0.1, "fast": 0.3}


@dataclass
class Plain:
    """A training run in one process, by plain PyTorch."""

    losses: list[float]
    norms: list[float]
    models: list[nn.Module]  # before every step, and after the last
    averages: dict[str, nn.Module]


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


def micro_batches(whole: tuple[Tensor, ...], world: World) -> list[tuple[Tensor, ...]]:
    """Two per rank of a global batch, of sizes that differ within and between ranks."""
    begin, end = (GLOBAL_BATCH * r // world.size for r in (world.rank, world.rank + 1))
    middle = (begin + end) // 2
    return [tuple(value[a:b] for value in whole) for a, b in ((begin, middle), (middle, end))]


def initialise(model: nn.Module, assign: object) -> None:
    init_weights(model, 7, assign)  # type: ignore[arg-type]


def train_plain() -> Plain:
    model = DiPoM(MODEL)
    init_weights(model, 7)
    optimizer = build_optimizer(model, OPTIMIZER)
    run = Plain([], [], [copy.deepcopy(model)], {name: copy.deepcopy(model) for name in EMA_WEIGHTS})
    for step in range(NUM_STEPS):
        loss = share(model, batch(step))
        loss.backward()
        run.losses.append(loss.item())
        run.norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05).item())
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.lr / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
        run.models.append(copy.deepcopy(model))
        with torch.no_grad():
            for name, weight in EMA_WEIGHTS.items():
                for mean, parameter in zip(run.averages[name].parameters(), model.parameters(), strict=True):
                    mean.lerp_(parameter, weight)
    return run


def build(
    world: World,
    *,
    engine: str = "deepspeed",
    precision: str = "fp32",
    checkpointing: str = "none",
    compiled: bool = False,
    moments: str = "fp32",
    **options: Any,
) -> Engine:
    with torch.device("meta"):
        model = DiPoM(MODEL)
    compute = ComputeConfig(precision=precision, activation_checkpointing=checkpointing, compile=compiled)  # type: ignore[arg-type]
    optimizer = OPTIMIZER.model_copy(update={"moments": moments})
    averages = list(EMA_WEIGHTS)
    if engine == "fsdp2":
        return Fsdp2Engine(
            model, initialise, world, fsdp2=Fsdp2Config(), compute=compute, optimizer=optimizer, averages=averages
        )
    deepspeed = DeepSpeedConfig(**options)
    return DeepSpeedEngine(
        model, initialise, world, deepspeed=deepspeed, compute=compute, optimizer=optimizer, averages=averages
    )


def whole(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor, of which each rank holds a part. A collective."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().clone()
    if not isinstance(tensor, FlatShard):
        return tensor.clone()
    filled = torch.zeros(tensor.shape, dtype=tensor.dtype)
    filled.view(-1)[tensor.start :][: tensor.values.numel()] = tensor.values
    dist.all_reduce(filled)
    return filled


def whole_state(state: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        flat.update(whole_state(value, f"{name}/") if isinstance(value, dict) else {name: whole(value)})
    return flat


def assert_same_bits(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].equal(value), name


def train(engine: Engine, world: World, plain: Plain, steps: range, tolerance: float) -> None:
    """Train as the plain loop does, with the same losses and norms."""
    for step in steps:
        (loss,) = world.sum([engine.forward_backward(micro_batches(batch(step), world), share)])
        norm = engine.step(OPTIMIZER.lr / (step + 1), EMA_WEIGHTS)
        torch.testing.assert_close(loss, plain.losses[step], rtol=tolerance, atol=0)
        torch.testing.assert_close(norm, plain.norms[step], rtol=10 * tolerance, atol=0)


def compare(world: World, plain: Plain, folder: Path | None = None, tolerance: float = 1e-5, **options: Any) -> None:
    """A whole run, interrupted by calls that must not change it. Saves half way if there is a folder."""
    engine = build(world, **options)
    for name, value in engine.state_dict()["model"].items():
        assert whole(value).equal(plain.models[0].get_parameter(name)), f"{name}: another initial weight"
    train(engine, world, plain, range(HALF_WAY), tolerance)
    state = whole_state(engine.state_dict())
    check_not_finite(engine, world, state)
    check_averaged(engine, state)
    check_resident(engine, world, options)
    if folder is not None:
        dcp.save(engine.state_dict(), storage_writer=dcp.FileSystemWriter(folder))
    train(engine, world, plain, range(HALF_WAY, NUM_STEPS), tolerance)
    check_end(engine, plain, tolerance)


def check_end(engine: Engine, plain: Plain, tolerance: float) -> None:
    state = engine.state_dict()
    assert_near(state["model"], plain.models[-1], tolerance)
    for average, module in plain.averages.items():
        assert_near(state["ema"][average], module, tolerance)
    assert all(moments["step"].item() == NUM_STEPS for moments in state["optimizer"].values())


def assert_near(state: dict[str, Tensor], module: nn.Module, tolerance: float) -> None:
    """Assert that a state is near a module: in fp32 number by number, in bf16 as a vector.

    In bf16 rounding decides the sign of a gradient near zero, and Adam makes a step as long as for any other."""
    ours = torch.cat([whole(state[name]).flatten() for name, _ in module.named_parameters()])
    theirs = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    if tolerance < 1e-3:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
    distance = (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()
    assert distance < 30 * tolerance, f"{distance:.1e}"


def check_not_finite(engine: Engine, world: World, state: dict[str, Tensor]) -> None:
    """One rank's gradient is not finite: the step changes nothing, on no rank."""
    factor = math.nan if world.rank == world.size - 1 else 1.0
    engine.forward_backward(micro_batches(batch(0), world), lambda model, part: share(model, part) * factor)
    assert not math.isfinite(engine.step(1.0, dict.fromkeys(EMA_WEIGHTS, 1.0)))
    assert_same_bits(whole_state(engine.state_dict()), state)


def check_averaged(engine: Engine, state: dict[str, Tensor]) -> None:
    """Within the block the model computes with the averages; after it, to the bit, as before."""
    x, t, condition, *_ = batch(99)
    reference = DiPoM(MODEL)
    with torch.no_grad():
        before = engine.model(x, t, condition)
        with engine.averaged("fast"):
            averaged = engine.model(x, t, condition)
        after = engine.model(x, t, condition)
        for name, parameter in reference.named_parameters():
            parameter.copy_(state[f"ema/fast/{name}"])
        expected = reference.to(before.dtype)(x, t, condition)
    torch.testing.assert_close(averaged, expected)
    assert after.equal(before)
    assert not after.equal(averaged)
    assert_same_bits(whole_state(engine.state_dict()), state)


def check_resident(engine: Engine, world: World, options: dict[str, Any]) -> None:
    """A rank's part of the masters and of what goes with them; all of the working parameters below stage 3."""
    num_parameters = sum(p.numel() for p in DiPoM(MODEL).parameters())
    working = num_parameters * (2 if options.get("precision") == "bf16" else 4)
    part = num_parameters * 4 / world.size
    expected = {
        "parameters": part + (working / world.size if options["zero_stage"] == 3 else working),
        "optimizer": 2 * part / (2 if options.get("moments") == "bf16" else 1),
        "ema": 2 * part,
    }
    for name, num_bytes in engine.resident_bytes().items():
        assert expected[name] <= num_bytes <= expected[name] * 1.01 + 64, f"{name}: {num_bytes}, not {expected[name]}"
    replicas = engine.replicas()
    assert (replicas is None) == (options["zero_stage"] == 3)
    if replicas is not None:
        held = world.gather(dict(replicas.tensors))
        for tensors in held:
            assert_same_bits(tensors, held[0])  # type: ignore[arg-type]


def check_device(world: World) -> None:
    other = "cpu" if world.device.type == "cuda" else "cuda"
    with pytest.raises(InputError, match=f"DS_ACCELERATOR={other}"):
        build(World(world.rank, world.size, torch.device(other)), zero_stage=1)


def train_some(world: World, plain: Plain, folder: Path) -> None:
    """Every stage, precision and option, each of them once."""
    check_device(world)
    compare(world, plain, zero_stage=2, folder=folder)
    compare(world, plain, zero_stage=1, offload_optimizer=True, checkpointing="full")
    compare(world, plain, zero_stage=3, checkpointing="selective")
    compare(world, plain, zero_stage=3, offload_optimizer=True, offload_parameters=True)
    compare(world, plain, zero_stage=1, precision="bf16", tolerance=1e-3)
    compare(world, plain, zero_stage=3, precision="bf16", tolerance=1e-3)
    compare(world, plain, zero_stage=2, moments="bf16", tolerance=1e-3)
    # What stage 3 could break, by freeing weights, is what is traced; generated code would take minutes of g++.
    torch.compiler.set_default_backend("aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # the tracer looks at gradients that are not there
        compare(world, plain, zero_stage=3, compiled=True, checkpointing="full")


def train_all(world: World, plain: Plain, folder: Path) -> None:
    compare(world, plain, zero_stage=1)
    compare(world, plain, zero_stage=2, offload_optimizer=True)
    compare(world, plain, zero_stage=3)
    compare(world, plain, zero_stage=3, offload_optimizer=True, offload_parameters=True, checkpointing="full")
    compare(world, plain, zero_stage=2, precision="bf16", tolerance=1e-3)
    train_some(world, plain, folder)


def go_on(world: World, plain: Plain, folder: Path, following: Path) -> None:
    """Load a checkpoint into fresh engines: it is the same to the bit, and each continues as the plain loop does."""
    whole_tensors = {name: torch.empty_like(p) for name, p in plain.models[0].named_parameters()}
    dcp.load({"model": whole_tensors}, storage_reader=dcp.FileSystemReader(folder))
    for name, parameter in plain.models[HALF_WAY].named_parameters():
        torch.testing.assert_close(whole_tensors[name], parameter.detach(), rtol=1e-3, atol=2e-5)
    settings: list[dict[str, Any]] = [{"engine": "fsdp2"}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}]
    saved: dict[str, Tensor] = {}
    for options in settings:
        engine = build(world, **options)
        with engine.loading() as state:
            dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
        loaded = whole_state(engine.state_dict())
        assert_same_bits(loaded, saved or loaded)
        saved = loaded
        if isinstance(engine, DeepSpeedEngine):
            check_averaged(engine, loaded)
        if options == {"zero_stage": 1}:
            dcp.save(engine.state_dict(), storage_writer=dcp.FileSystemWriter(following))
        train(engine, world, plain, range(HALF_WAY, NUM_STEPS), 1e-5)
        check_end(engine, plain, 1e-5)
    for name, tensor in whole_tensors.items():
        assert tensor.equal(saved[f"model/{name}"]), name


if __name__ == "__main__":
    mode, *folders = sys.argv[1:]
    warnings.simplefilter("error", UserWarning)
    plain = train_plain()  # first: DeepSpeed replaces torch.nn.functional.linear
    with join_world("cpu") as world:
        {"train": train_some, "all": train_all, "go-on": go_on}[mode](world, plain, *map(Path, folders))
        print("engines equal the plain loop", flush=True)
    os._exit(0)  # as the command line does, and for its reason
