"""Muon on one process: torch's own step for step; which parameters are matrices; its arithmetic and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pomscale.benchmarks.plan import pretended_world
from pomscale.benchmarks.storage_tracker import StorageTracker
from pomscale.config.engine import ComputeConfig, Fsdp2Config, OptimizerConfig
from pomscale.config.model import ImageModelConfig, ModelConfig, VideoModelConfig
from pomscale.engine.fsdp2 import Fsdp2Engine
from pomscale.engine.matrices import block_matrices, stacked_matrices
from pomscale.engine.muon import Muon, orthogonalize
from pomscale.engine.optimizers import build_optimizer, init_state
from pomscale.models import DiPoM, init_weights, make_model
from pomscale.plan.model_cost import training_flops
from pomscale.plan.optimizer import matrix_sides, step_bytes, step_flops
from pomscale.plan.shadow.network import build_network

V2: dict[str, Any] = {"kind": "pom", "form": "coefficients", "heads": 4, "groups": 2, "rope": True}
PICTURES = ImageModelConfig(
    latent_shape=(4, 4, 4),
    num_classes=3,
    patch_size=1,
    dim=20,
    depth=3,
    num_heads=2,
    degree=3,
    mixer=["pom", "attention", V2],
)
CLIPS = VideoModelConfig(
    kind="video",
    latent_shape=(4, 2, 4, 4),
    text_dim=12,
    patch_size=2,
    patch_frames=1,
    dim=20,
    depth=2,
    num_heads=2,
    mixer=["pom", "attention"],
)
NUM_STEPS = 10


def optimizer_of(weights: Sequence[nn.Parameter], number: int = 1, **changes: Any) -> Muon:
    config = OptimizerConfig(name="muon", **{"lr": 0.02, "weight_decay": 0.1, **changes})
    rest = torch.optim.AdamW([nn.Parameter(torch.zeros(3))], lr=0.02)
    optimizer = Muon(dict.fromkeys(weights, number), rest, config)
    for weight in weights:
        init_state(optimizer, weight, config, is_matrix=True)
    return optimizer


def torch_muon(weights: Sequence[Tensor], **changes: Any) -> torch.optim.Muon:
    settings = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw", **changes}
    return torch.optim.Muon(weights, **settings)


@pytest.mark.parametrize(
    "settings", [{}, {"nesterov": False, "momentum": 0.8, "ns_steps": 3}], ids=["default", "other"]
)
def test_every_step_is_torchs_to_the_bit(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (5, 7), (13, 13), (1, 9), (9, 1), (33, 6)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    optimizers = optimizer_of(ours, muon=settings), torch_muon(theirs, **settings)
    for step in range(NUM_STEPS):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator) * 10.0 ** (step % 3 - 1)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (step + 1)
            optimizer.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.equal(other)
            assert optimizers[0].state[mine]["momentum_buffer"].equal(optimizers[1].state[other]["momentum_buffer"])


def test_stacked_maps_are_matrices_of_their_own() -> None:
    generator = torch.Generator().manual_seed(1)
    fused = nn.Parameter(torch.randn(3 * 7, 5, generator=generator))
    parts = [nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    whole = nn.Parameter(fused.detach().clone())
    optimizers = optimizer_of([fused], 3), torch_muon(parts), torch_muon([whole])
    fused.grad = torch.randn(fused.shape, generator=generator)
    for part, gradient in zip(parts, fused.grad.chunk(3), strict=True):
        part.grad = gradient
    whole.grad = fused.grad
    for optimizer in optimizers:
        optimizer.step()
    assert fused.equal(torch.cat(parts))  # type: ignore[arg-type]
    assert not torch.allclose(fused, whole)


def test_orthogonalized_matrices_have_singular_values_near_1() -> None:
    """Against the singular value decomposition, in float64; the iteration stops between 0.7 and 1.2 by design."""
    matrix = torch.randn(30, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix.clone(), 5)
    values = torch.linalg.svdvals(result)
    assert 0.6 < values.min() <= values.max() < 1.25
    # It has the same singular vectors.
    inner = u.T @ result @ vh.T
    torch.testing.assert_close(inner, inner.diag().diag(), atol=1e-10, rtol=0)


def test_bf16_momentum_follows_fp32() -> None:
    generator = torch.Generator().manual_seed(3)
    fp32, bf16 = (nn.Parameter(torch.ones(40, 30)) for _ in range(2))
    optimizers = optimizer_of([fp32]), optimizer_of([bf16], moments="bf16")
    for _ in range(50):
        fp32.grad = torch.randn(40, 30, generator=generator)
        bf16.grad = fp32.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    buffers = [o.state[w]["momentum_buffer"] for o, w in zip(optimizers, (fp32, bf16), strict=True)]
    assert buffers[1].dtype == torch.bfloat16
    torch.testing.assert_close(buffers[1].float(), buffers[0], atol=0.03 * buffers[0].std().item(), rtol=0.03)


def test_bf16_momenta_of_equal_gradients_are_rounded_differently() -> None:
    """In one weight that stacks two matrices, and in another weight."""
    weights = [nn.Parameter(torch.ones(40, 30)) for _ in range(2)]
    optimizer = optimizer_of(weights, number=2, moments="bf16")
    gradient = torch.randn(20, 30, generator=torch.Generator().manual_seed(3)).repeat(2, 1)
    for weight in weights:
        weight.grad = gradient.clone()
    optimizer.step()
    momenta = [half for weight in weights for half in optimizer.state[weight]["momentum_buffer"].float().split(20)]
    for one, other in pairwise(momenta):
        torch.testing.assert_close(one, other, atol=0, rtol=2**-7)
        assert (one != other).float().mean() > 0.2


# --- the parameters --------------------------------------------------------------------------------------------------


def test_matrices_are_the_weights_of_linear_maps_in_blocks() -> None:
    model = make_model(PICTURES)
    numbers = block_matrices(model)
    in_blocks = {n for n, p in model.named_parameters() if n.startswith("trunk.") and p.ndim == 2}
    assert set(numbers) == {name for name in in_blocks if not name.endswith("coefficients")}
    stacked = {name.removesuffix(".weight"): number for name, number in numbers.items() if number > 1}
    of_every_block = {f"trunk.{i}.{name}": n for i in range(3) for name, n in (("modulation", 4), ("gates", 2))}
    # The product form stacks the maps of its three factors, attention key and value; groups are maps of their own.
    of_mixers = {"trunk.0.mixer.projection": 3, "trunk.1.mixer.key_value": 2, "trunk.2.mixer.projection": 2}
    assert stacked == of_every_block | of_mixers


def test_matrices_of_clips() -> None:
    numbers = block_matrices(make_model(CLIPS))
    assert {name.split(".", 2)[2]: n for name, n in numbers.items() if name.startswith("trunk.0.") and n > 1} == {
        "cross.projection.weight": 2,
        "mixer.projection.weight": 2,
        "modulation.weight": 8,
        "gates.weight": 3,
    }
    assert not any("embedding" in name or name.startswith("head") for name in numbers)


def test_stacks_that_do_not_fit_are_refused() -> None:
    model = make_model(PICTURES)
    model.blocks()[0].stacked_maps = {"modulation": 3}  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"trunk\.0\.modulation\.weight: 3 maps cannot share 80 rows"):
        block_matrices(model)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 50])
def test_ranks_hold_the_elements_of_every_matrix_once(num_ranks: int) -> None:
    """Whatever the cuts: rows, as FSDP2 has them, or any elements, as ZeRO has them."""
    shape, number = (12, 5), 3
    values = torch.arange(60.0)
    for cuts in ([min(-(-12 // num_ranks) * 5 * r, 60) for r in range(num_ranks + 1)], None):
        bounds = cuts or [60 * r // num_ranks for r in range(num_ranks + 1)]
        ranges = list(pairwise(bounds))
        found: list[list[Tensor]] = [[] for _ in range(number)]
        for rank, (start, stop) in enumerate(ranges):
            local = torch.cat([torch.full((4,), -1.0), values[start:stop]])  # after parts of other parameters
            for i, matrix in enumerate(stacked_matrices(local, shape, number, ranges, rank, offset=4)):
                found[i].append(matrix.tensor[matrix.offset :][: matrix.counts[rank]])
        assert [torch.cat(parts).tolist() for parts in found] == [part.tolist() for part in values.view(3, 20)]


def test_a_model_is_trained_as_by_torchs_optimizers() -> None:
    ours, theirs = DiPoM(PICTURES), DiPoM(PICTURES)
    init_weights(ours, 7)
    theirs.load_state_dict(ours.state_dict())
    config = OptimizerConfig(name="muon", lr=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(ours, config)
    numbers = block_matrices(theirs)
    parts = {
        n: [nn.Parameter(p.clone()) for p in theirs.get_parameter(n).detach().chunk(k)] for n, k in numbers.items()
    }
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in theirs.named_parameters():
        if name not in numbers:
            is_undecayed = parameter.ndim == 1 or name in ("class_embedding.weight", "trunk.2.mixer.coefficients")
            (undecayed if is_undecayed else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": undecayed, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    muon = torch_muon([part for several in parts.values() for part in several], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x, t = torch.randn(5, 4, 4, 4, generator=generator), torch.rand(5, generator=generator)
        for model in (ours, theirs):
            (model(x, t, torch.arange(5) % 4) - x).square().mean().backward()
        for name, several in parts.items():
            for part, gradient in zip(several, theirs.get_parameter(name).grad.chunk(len(several)), strict=True):  # type: ignore[union-attr]
                part.grad = gradient
        for each in (optimizer, muon, adamw):
            each.step()
        with torch.no_grad():
            for name, several in parts.items():
                theirs.get_parameter(name).copy_(torch.cat(several))  # type: ignore[arg-type]
        for model in (ours, theirs):
            model.zero_grad()
        for name, parameter in ours.named_parameters():
            assert parameter.equal(theirs.get_parameter(name)), name


# --- arithmetic and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [PICTURES, CLIPS], ids=["pictures", "clips"])
def test_the_plan_counts_the_flops_that_torch_counts(model: ModelConfig) -> None:
    network = make_model(model)
    init_weights(network, 0)
    optimizer = build_optimizer(network, OptimizerConfig(name="muon"))
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == step_flops(OptimizerConfig(name="muon"), build_network(model, 1))
    assert step_flops(OptimizerConfig(), build_network(model, 1)) == 0


def test_its_share_of_a_step() -> None:
    """At most 5 % of the arithmetic from 340 samples a step on; 3.26 TFLOP divide over ranks."""
    model = ImageModelConfig(preset="dipom-b-2", latent_shape=(4, 32, 32), num_classes=1000)  # type: ignore[call-arg]
    network, muon = build_network(model, 1), OptimizerConfig(name="muon")
    whole = step_flops(muon, network)
    assert whole == pytest.approx(3.26e12, rel=0.01)
    assert whole / (340 * training_flops(model)) < 0.05
    assert step_flops(muon, network, 8) < 1.1 * whole / 8


def test_no_more_than_one_matrix_is_gathered() -> None:
    """The step of rank 0 of 8 holds the largest matrix, its parts of others, and the iteration's own, and no more."""
    config = PICTURES.model_copy(update={"dim": 64, "depth": 12})
    compute, optimizer = ComputeConfig(precision="fp32"), OptimizerConfig(name="muon")
    with pretended_world(8) as world:
        with torch.device("meta"):
            model = make_model(config)
        engine = Fsdp2Engine(
            model,
            lambda model, assign: init_weights(model, 0, assign),
            world,
            fsdp2=Fsdp2Config(),
            compute=compute,
            optimizer=optimizer,
            averages=[],
        )
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        engine.step(1e-3, {})  # AdamW's kernels and the communicator are there
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        held = [*model.parameters(), *(p.grad for p in model.parameters()), *moments(engine)]
        with StorageTracker([t.to_local() for t in held if t is not None]) as tracker:  # type: ignore[attr-defined]
            before = tracker.live
            engine._optimizer.step()
    network = build_network(config, 1)
    needed = step_bytes(optimizer.muon, network, 8)
    assert tracker.peak - before == pytest.approx(needed, rel=0.15)
    assert needed < 2 * sum(math.prod(sides) for sides in matrix_sides(network)) / 4  # as all of them would take


def moments(engine: Fsdp2Engine) -> list[Tensor]:
    states = engine.state_dict()["optimizer"].values()
    return [tensor for state in states for name, tensor in state.items() if name != "step"]
