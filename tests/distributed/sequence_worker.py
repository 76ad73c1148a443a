"""One rank of test_sequence_parallel.py: tokens split over real ranks, against one process that holds all of them.

sequence_worker.py sums          the mixer over groups of 2 and more ranks: outputs, gradients, what is sent
sequence_worker.py compiled      the mixer as one graph of torch.compile
sequence_worker.py ENGINE ...    engines, by the names in ENGINES, on a network of pictures and on one of clips
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pomscale.base.condition import Text
from pomscale.config.engine import ComputeConfig, DeepSpeedConfig, Fsdp2Config, OptimizerConfig
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.diffusion.objectives import FlowMatching
from pomscale.distributed.sequence_parallel import GroupCollectives, SequenceRanks
from pomscale.distributed.world import World, join_world
from pomscale.engine.fsdp2 import Fsdp2Engine
from pomscale.engine.optimizers import build_optimizer
from pomscale.engine.protocol import Engine
from pomscale.layers import PoM
from pomscale.models import init_weights, make_model
from pomscale.ops.pom import BlockCausal, Mask, TokenSplit
from pomscale.shards.schema import Normalization
from pomscale.training.loss import LocalTokens, TrainBatch, share_of_loss

BATCH, DIM = 2, 8
LENGTHS = {2: [13, 10], 3: [1, 14, 8], 4: [9, 2, 11, 6]}


# --- the mixer -------------------------------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Collects name and bytes of every functional collective that runs within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = str(function)
        if name.startswith("_c10d_functional.") and "wait_tensor" not in name:
            self.collectives.append((name.split(".")[1], arguments[0].nbytes))
        return function(*arguments, **(keywords or {}))


def mixers() -> dict[str, PoM]:
    torch.manual_seed(3)
    found = {
        "product": PoM(DIM, degree=3),
        "coefficients": PoM(DIM, degree=2, form="coefficients"),
        "heads": PoM(DIM, degree=3, form="coefficients", heads=4, rope=2),
    }
    for mixer in found.values():
        if mixer.coefficients is not None:
            nn.init.normal_(mixer.coefficients)
    return {name: mixer.double() for name, mixer in found.items()}


def total(gradients: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """The sum over ranks of gradients, as an engine has it."""
    # Without a word, gloo adds up tensors of other strides in the order in which they lie in memory.
    gradients = [gradient.contiguous() for gradient in gradients]
    for gradient in gradients:
        dist.all_reduce(gradient, group=group)
    return gradients


def compare_mixer(mixer: PoM, mask: Mask, split: TokenSplit, group: dist.ProcessGroup) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, split.num_tokens, DIM, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    positions = None if mixer.form.rope is None else torch.arange(2 * split.num_tokens).view(-1, 2)
    leaves = [x, *mixer.parameters()]
    part = split.tokens

    whole = mixer(x, mask=mask, positions=positions)
    theirs = torch.autograd.grad((whole * weights).sum(), leaves)
    local_mask = mask[:, part] if isinstance(mask, Tensor) else mask
    local_positions = None if positions is None else positions[part]
    ours = mixer(x[:, part], mask=local_mask, positions=local_positions, split=split)
    # The gradient of x is 0 outside of this rank's tokens, and complete in them.
    gradients = total(list(torch.autograd.grad((ours * weights[:, part]).sum(), leaves)), group)
    for our, their in zip([ours, *gradients], [whole[:, part], *theirs], strict=True):
        torch.testing.assert_close(our, their, rtol=1e-11, atol=1e-11 * their.abs().max().item())


def sent(mixer: PoM, num_tokens: int, mask: Mask, ranks: SequenceRanks) -> list[tuple[str, int]]:
    """Collectives of forward and backward, in float32."""
    split = TokenSplit.even(num_tokens, ranks.size, ranks.rank, ranks.collectives)
    x = torch.zeros(BATCH, split.stop - split.start, DIM, requires_grad=True)
    with Sent() as counted:
        mixer(x, mask=mask, split=split).sum().backward()
    return counted.collectives


def check_sums(world: World) -> None:
    for size in range(2, world.size + 1):
        group = dist.new_group(list(range(size)))
        if world.rank >= size:
            continue
        lengths = LENGTHS[size]
        bounds = tuple(sum(lengths[:rank]) for rank in range(size + 1))
        split = TokenSplit(bounds, world.rank, GroupCollectives.of(group))
        padding = torch.rand(BATCH, bounds[-1], generator=torch.Generator().manual_seed(1)) > 0.4
        padding[0, bounds[1] : bounds[2]], padding[1] = False, False  # rank 1 has none, and sample 1 neither
        for mixer in mixers().values():
            for mask in (None, padding, "causal", *(BlockCausal(length) for length in (4, 5, 7, 50))):
                compare_mixer(mixer, mask, split, group)  # type: ignore[arg-type]
    ranks = SequenceRanks.of(world, world.size)
    assert ranks is not None
    mixer, width = mixers()["product"].float(), 3 * 2 * DIM
    for mask, kinds, numbers in (
        (None, ["all_reduce", "all_reduce"], width + 1),
        ("causal", ["all_gather_into_tensor", "reduce_scatter_tensor"], width),
        (BlockCausal(24), ["all_gather_into_tensor", "reduce_scatter_tensor"], 2 * width),
    ):
        num_bytes = 4 * BATCH * numbers
        gradients = num_bytes * (world.size if mask is not None else 1)
        for num_tokens in (512, 8192):
            assert sent(mixer, num_tokens, mask, ranks) == [(kinds[0], num_bytes), (kinds[1], gradients)]  # type: ignore[arg-type]
    print("split mixers equal one that has all tokens", flush=True)


def check_compiled(world: World) -> None:
    """The collectives are part of the graph: fullgraph raises where it would break."""
    ranks = SequenceRanks.of(world, world.size)
    assert ranks is not None
    split = TokenSplit.even(23, ranks.size, ranks.rank, ranks.collectives)
    mixer = mixers()["heads"]
    positions = torch.arange(46).view(23, 2)[split.tokens]
    for mask in (None, "causal", BlockCausal(5)):
        mix = partial(mixer, mask=mask, positions=positions, split=split)  # type: ignore[arg-type]
        compiled = torch.compile(lambda x, mix=mix: mix(x), fullgraph=True, backend="aot_eager")
        x = torch.randn(BATCH, split.stop - split.start, DIM, dtype=torch.float64, requires_grad=True)
        leaves = [x, *mixer.parameters()]
        for ours, theirs in zip(
            [compiled(x), *torch.autograd.grad(compiled(x).square().sum(), leaves)],
            [mix(x), *torch.autograd.grad(mix(x).square().sum(), leaves)],
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    print("compiled mixers equal eager ones", flush=True)


CHECKS = {"sums": check_sums, "compiled": check_compiled}


# --- engines ---------------------------------------------------------------------------------------------------------

IMAGE = ImageModelConfig(latent_shape=(4, 5, 5), num_classes=3, patch_size=1, dim=20, depth=2)
VIDEO = VideoModelConfig(
    kind="video", latent_shape=(3, 6, 6, 6), text_dim=6, dim=20, depth=2, temporal="block_causal"
)  # 3 frame groups of 9 tokens
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, grad_clip=0.05)
GLOBAL_BATCH, NUM_STEPS = 7, 10
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "fsdp2-full": {"compute": ComputeConfig(precision="fp32", activation_checkpointing="full")},
    "hsdp": {"fsdp2": Fsdp2Config(shard_size=2)},
    "zero-1": {"deepspeed": DeepSpeedConfig(zero_stage=1)},
    "zero-2": {"deepspeed": DeepSpeedConfig(zero_stage=2)},
    "zero-3": {"deepspeed": DeepSpeedConfig(zero_stage=3)},
}


def batch(config: ImageModelConfig | VideoModelConfig, step: int, samples: slice) -> TrainBatch:
    """Samples of the global batch of a step. A sample of the clips could not be read."""
    generator = torch.Generator().manual_seed(step)
    x0, eps = torch.randn(2, GLOBAL_BATCH, *config.latent_shape, generator=generator)[:, samples]
    t, weights = torch.rand(GLOBAL_BATCH, 3, generator=generator), torch.ones(GLOBAL_BATCH)
    if isinstance(config, ImageModelConfig):
        return TrainBatch(x0, eps, t[samples, 0], torch.arange(GLOBAL_BATCH)[samples] % 4, None, weights[samples], ())
    text = torch.randn(GLOBAL_BATCH, 5, 6, generator=generator)
    mask = torch.rand(GLOBAL_BATCH, 5, generator=generator) > 0.3
    weights[3] = 0
    t = t if step % 2 else t[:, 0]  # a t of its own for every frame group, every other step
    start = torch.arange(GLOBAL_BATCH) % 2
    return TrainBatch(x0, eps, t[samples], Text(text[samples], mask[samples]), start[samples], weights[samples], ())


def build(config: ImageModelConfig | VideoModelConfig, world: World, options: dict[str, Any]) -> Engine:
    with torch.device("meta"):
        model = make_model(config)
    common = {"compute": ComputeConfig(precision="fp32"), "optimizer": OPTIMIZER, "averages": ["slow"]}

    def initialise(model: nn.Module, assign: Any) -> None:
        init_weights(model, 7, assign)

    if "deepspeed" in options:
        from pomscale.engine.deepspeed import DeepSpeedEngine  # noqa: PLC0415  # DeepSpeed is optional

        return DeepSpeedEngine(model, initialise, world, **{**common, **options})
    return Fsdp2Engine(model, initialise, world, **{"fsdp2": Fsdp2Config(), **common, **options})


def share(
    config: ImageModelConfig | VideoModelConfig, local: LocalTokens | None, model: nn.Module, part: TrainBatch
) -> Tensor:
    channels = config.latent_shape[0]
    normalization = Normalization((0.1,) * channels, (1.5,) * channels)
    return share_of_loss(FlowMatching(), normalization, GLOBAL_BATCH, torch.device("cpu"), local, model, part)


def train_plain(config: ImageModelConfig | VideoModelConfig) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, by plain PyTorch in one process."""
    model = make_model(config)
    init_weights(model, 7)
    optimizer = build_optimizer(model, OPTIMIZER)
    found = []
    for step in range(NUM_STEPS):
        loss = share(config, None, model, batch(config, step, slice(0, GLOBAL_BATCH)))
        loss.backward()
        found.append((loss.item(), nn.utils.clip_grad_norm_(model.parameters(), 0.05).item()))
        optimizer.step()
        optimizer.zero_grad()
    return found


def compare_engine(
    config: ImageModelConfig | VideoModelConfig,
    plain: list[tuple[float, float]],
    world: World,
    sp: int,
    options: dict[str, Any],
) -> None:
    """Losses and gradient norms of ten steps, with two micro-batches of unequal sizes."""
    ranks = SequenceRanks.of(world, sp)
    assert ranks is not None
    split = partial(TokenSplit.even, num_ranks=sp, rank=ranks.rank, collectives=ranks.collectives)
    of_rank = partial(share, config, LocalTokens(config, split))
    engine = build(config, world, options)
    data_rank, num_data_ranks = world.rank // sp, world.size // sp
    begin, end = (GLOBAL_BATCH * rank // num_data_ranks for rank in (data_rank, data_rank + 1))
    middle = (begin + end) // 2
    for step, (expected, expected_norm) in enumerate(plain):
        parts = [batch(config, step, slice(*bounds)) for bounds in ((begin, middle), (middle, end))]
        (loss,) = world.sum([engine.forward_backward(parts, of_rank)])
        norm = engine.step(OPTIMIZER.lr, {"slow": 0.1})
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(norm, expected_norm, rtol=1e-4, atol=0)


if __name__ == "__main__":
    # FSDP warns of mistakes that only corrupt gradients; torch warns of names that DeepSpeed uses by FutureWarning.
    warnings.simplefilter("error", UserWarning)
    plain = {config.kind: train_plain(config) for config in (IMAGE, VIDEO)}  # DeepSpeed replaces F.linear
    with join_world("cpu") as world:
        for name in sys.argv[1:]:
            if name in CHECKS:
                CHECKS[name](world)
                continue
            for config in (IMAGE, VIDEO):
                for sp in (size for size in (2, 3, 4) if world.size % size == 0):
                    compare_engine(config, plain[config.kind], world, sp, ENGINES[name])
            print(f"{name} equals a plain loop", flush=True)
    os._exit(0)  # as the command line does, and for its reason
