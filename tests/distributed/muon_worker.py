"""One rank of test_muon_ranks.py: Muon and the choices of a JiT by every engine against a plain loop of one process.

The engines' workers without these choices and with AdamW are engine_worker.py and deepspeed_worker.py.

muon_worker.py train FOLDER     every engine from the start; ZeRO 2 saves to FOLDER half way
muon_worker.py go-on FOLDER     what is in FOLDER is loaded by every engine, which goes on
muon_worker.py hsdp             two copies of the model on four ranks
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deepspeed_worker import EMA_WEIGHTS, GLOBAL_BATCH, assert_same_bits, micro_batches, whole_state
from torch import Tensor, nn

from pomscale.config.engine import ComputeConfig, DeepSpeedConfig, Fsdp2Config, MuonConfig, OptimizerConfig
from pomscale.config.model import ImageModelConfig
from pomscale.diffusion.draws import dropout_seeds
from pomscale.diffusion.objectives import XPrediction, per_sample_loss
from pomscale.distributed.world import World, join_world
from pomscale.engine.deepspeed import DeepSpeedEngine
from pomscale.engine.fsdp2 import Fsdp2Engine
from pomscale.engine.matrices import block_matrices
from pomscale.engine.optimizers import build_optimizer
from pomscale.engine.protocol import Engine
from pomscale.models import DiPoM, init_weights

# The trunk of a JiT, with each kind of mixer; dropout in its inner blocks.
MODEL = ImageModelConfig.model_validate(
    {
        "latent_shape": (4, 4, 4),
        "num_classes": 3,
        "patch_size": 1,
        "dim": 24,
        "depth": 4,
        "num_heads": 2,
        "mixer": [
            "pom",
            {"kind": "attention", "qk_norm": True, "rope": True},
            {"kind": "pom", "form": "coefficients", "degree": 3, "heads": 4, "groups": 2, "rope": True},
            {"kind": "pom", "form": "coefficients", "heads": 4, "rope": True},
        ],
        "norm": "rms",
        "gates": "g",
        "ffn": "swiglu",
        "positions": "sincos_integer",
        "time_embedding": "data_fraction",
        "patch_embedding": {"bottleneck": 3},
        "in_context": {"tokens": 3, "start": 1},
        "dropout": {"rate": 0.2, "first": 1, "last": 2},
    }
)
ONE_BLOCK = ImageModelConfig.model_validate(
    MODEL.model_dump() | {"depth": 1, "mixer": "attention", "in_context": None, "dropout": {"rate": 0.2}}
)
Plain: TypeAlias = tuple[list[float], nn.Module, nn.Module]
# Every step is clipped. In fp32, whose last digits alone depend on the layout.
OPTIMIZER = OptimizerConfig(
    name="muon",
    lr=3e-2,
    weight_decay=0.1,
    grad_clip=0.05,
    muon=MuonConfig(precision="fp32"),
)
NUM_STEPS, HALF_WAY = 10, 5
TOLERANCE, ROUNDED = 1e-5, 3e-2  # of losses in fp32, and with weights or moments in bf16
ENGINES: list[dict[str, Any]] = [{}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}]
OTHERS: list[dict[str, Any]] = [
    {"cpu_offload": True, "checkpointing": "selective"},
    {"zero_stage": 2, "offload_optimizer": True, "checkpointing": "full"},
]


def global_batch(step: int) -> tuple[Tensor, ...]:
    """Data, noise, times, classes and the seeds of dropout."""
    generator = torch.Generator().manual_seed(step)
    x0, eps = torch.randn(2, GLOBAL_BATCH, *MODEL.latent_shape, generator=generator)
    seeds = dropout_seeds(7, list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)))
    return x0, eps, torch.rand(GLOBAL_BATCH, generator=generator), torch.arange(GLOBAL_BATCH) % 4, seeds


def share(model: nn.Module, part: tuple[Tensor, ...]) -> Tensor:
    """Return the part's share of the loss of x-prediction."""
    x0, eps, t, condition, seeds = part
    network = partial(model, dropout_seeds=seeds)
    return per_sample_loss(XPrediction(), network, x0, eps, t, condition).sum() / GLOBAL_BATCH


def learning_rate(step: int) -> float:
    return OPTIMIZER.lr / (step + 1)


def initialise(model: nn.Module, assign: Callable[[nn.Parameter, Tensor], object]) -> None:
    """No weight is zero: from the usual ones, by which blocks begin as identities, losses would not tell them apart."""
    generator = torch.Generator().manual_seed(7)

    def assign_moved(parameter: nn.Parameter, value: Tensor) -> None:
        assign(parameter, value + 0.1 * torch.randn(value.shape, generator=generator))

    init_weights(model, 7, assign_moved)


def train_plain(config: OptimizerConfig = OPTIMIZER, network: ImageModelConfig = MODEL) -> Plain:
    """Losses, the network and its slow average after NUM_STEPS of plain PyTorch."""
    model = DiPoM(network)
    initialise(model, lambda parameter, value: parameter.data.copy_(value))
    optimizer, losses, average = build_optimizer(model, config), [], copy.deepcopy(model)
    for step in range(NUM_STEPS):
        loss = share(model, global_batch(step))
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(parameter, EMA_WEIGHTS["slow"])
    return losses, model, average


def build(
    world: World,
    *,
    network: ImageModelConfig = MODEL,
    precision: str = "fp32",
    checkpointing: str = "none",
    optimizer: OptimizerConfig = OPTIMIZER,
    **options: Any,
) -> Engine:
    with torch.device("meta"):
        model = DiPoM(network)
    common: dict[str, Any] = {
        "compute": ComputeConfig.model_validate({"precision": precision, "activation_checkpointing": checkpointing}),
        "optimizer": optimizer,
        "averages": list(EMA_WEIGHTS),
    }
    if "zero_stage" in options:
        return DeepSpeedEngine(model, initialise, world, deepspeed=DeepSpeedConfig(**options), **common)
    return Fsdp2Engine(model, initialise, world, fsdp2=Fsdp2Config(**options), **common)


def train(engine: Engine, world: World, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses += world.sum([engine.forward_backward(micro_batches(global_batch(step), world), share)])
        engine.step(learning_rate(step), EMA_WEIGHTS)
    return losses


def assert_near(losses: list[float], expected: list[float], tolerance: float, options: object) -> None:
    worst = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, expected, strict=True))
    if dist.get_rank() == 0:
        print(f"{options}: {worst:.1e}", flush=True)
    assert worst < tolerance, f"{options}: {losses} not {expected}"


def check_end(engine: Engine, model: nn.Module, average: nn.Module) -> None:
    """Compare the matrices; of the bias of keys AdamW amplifies rounding, since its gradient is 0."""
    state, matrices = whole_state(engine.state_dict()), block_matrices(model)
    for name, parameter in model.named_parameters():
        assert state[f"optimizer/{name}/step"].item() == NUM_STEPS
        assert (f"optimizer/{name}/momentum_buffer" in state) == (name in matrices)
        if name in matrices:
            torch.testing.assert_close(state[f"model/{name}"], parameter.detach(), rtol=1e-3, atol=1e-4)
            mean = average.get_parameter(name).detach()
            torch.testing.assert_close(state[f"ema/slow/{name}"], mean, rtol=1e-3, atol=1e-4)


def check_not_finite(engine: Engine, world: World) -> None:
    """A step whose gradient is not finite changes nothing, momenta included."""
    before = whole_state(engine.state_dict())
    factor = float("nan") if world.rank == world.size - 1 else 1.0
    engine.forward_backward(micro_batches(global_batch(0), world), lambda model, part: share(model, part) * factor)
    engine.step(1.0, dict.fromkeys(EMA_WEIGHTS, 1.0))
    assert_same_bits(whole_state(engine.state_dict()), before)


def train_all(world: World, plain: Plain, folder: Path) -> None:
    losses, model, average = plain
    # The others come first: ZeRO 3 leaves a linear map of DeepSpeed's in the process, with which "selective" is wrong.
    for options in (*OTHERS, *ENGINES):
        engine = build(world, **options)
        found = train(engine, world, range(HALF_WAY))
        check_not_finite(engine, world)
        if options == {"zero_stage": 2}:
            dcp.save(engine.state_dict(), storage_writer=dcp.FileSystemWriter(folder))
        found += train(engine, world, range(HALF_WAY, NUM_STEPS))
        assert_near(found, losses, TOLERANCE, options)
        check_end(engine, model, average)
    # The plain loop's arithmetic is that of fp32.
    usual = OPTIMIZER.model_copy(update={"muon": MuonConfig()})
    others = train_plain(OPTIMIZER.model_copy(update={"muon": MuonConfig(ns_steps=1, precision="fp32")}))[0]
    differences = [abs(other / loss - 1) for other, loss in zip(others, losses, strict=True)]
    assert max(differences) > 3 * TOLERANCE, "the losses do not tell how matrices were stepped"
    usual_cases: list[tuple[str, dict[str, Any]]] = [("fp32", {"zero_stage": 1, "precision": "bf16"}), ("bf16", {})]
    for moments, options in usual_cases:
        engine = build(world, optimizer=usual.model_copy(update={"moments": moments}), **options)
        assert_near(train(engine, world, range(NUM_STEPS)), losses, ROUNDED, (options, moments))


def go_on(world: World, plain: Plain, folder: Path) -> None:
    """Load a checkpoint into fresh engines: it is the same to the bit, and each continues as the plain loop does."""
    losses, model, average = plain
    saved: dict[str, Tensor] = {}
    for options in ENGINES if world.size > 1 else (ENGINES[0], ENGINES[-1]):
        engine = build(world, **options)
        with engine.loading() as state:
            dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
        loaded = whole_state(engine.state_dict())
        saved = saved or loaded
        assert_same_bits(loaded, saved)
        momenta = [value for name, value in loaded.items() if name.endswith("momentum_buffer")]
        assert momenta
        assert all(momentum.any() for momentum in momenta)
        assert_near(train(engine, world, range(HALF_WAY, NUM_STEPS)), losses[HALF_WAY:], TOLERANCE, options)
        check_end(engine, model, average)


def train_hsdp(world: World, plain: Plain, plain_of_one: Plain) -> None:
    losses, model, average = plain
    engine = build(world, shard_size=2)
    assert_near(train(engine, world, range(NUM_STEPS)), losses, TOLERANCE, "HSDP")
    check_end(engine, model, average)
    check_copies(engine)
    rounded = build(world, shard_size=2, optimizer=OPTIMIZER.model_copy(update={"moments": "bf16"}))
    assert_near(train(rounded, world, range(NUM_STEPS)), losses, ROUNDED, "HSDP, moments in bf16")
    check_copies(rounded)
    # One block has fewer matrices than the last round has ranks.
    losses, model, average = plain_of_one
    engine = build(world, shard_size=2, network=ONE_BLOCK)
    assert_near(train(engine, world, range(NUM_STEPS)), losses, TOLERANCE, "HSDP, one block")
    check_end(engine, model, average)
    check_copies(engine)


def check_copies(engine: Engine) -> None:
    """Assert that both copies of the model are the same to the bit."""
    replicas = engine.replicas()
    assert replicas is not None
    held: list[Any] = [None, None]
    dist.all_gather_object(held, dict(replicas.tensors), group=replicas.group)
    assert_same_bits(*held)


if __name__ == "__main__":
    mode, *folders = sys.argv[1:]
    warnings.simplefilter("error", UserWarning)
    # First: DeepSpeed replaces torch.nn.functional.linear.
    plain = [train_plain(), *([train_plain(network=ONE_BLOCK)] if mode == "hsdp" else [])]
    with join_world("cpu") as world:
        modes: dict[str, Callable[..., None]] = {"train": train_all, "go-on": go_on, "hsdp": train_hsdp}
        modes[mode](world, *plain, *map(Path, folders))
        print("Muon equals the plain loop", flush=True)
    os._exit(0)  # as the command line does, and for its reason
