"""Initial weights, which depend on the seed and on the name of a parameter alone.

Every parameter has its own generator, so the result does not depend on build order, world size or sharding, and no
process ever holds more than one whole parameter beside its shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pomscale.layers import GroupedLinear, InContextTokens, PoM, RMSNorm


def _copy(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, assign: Callable[[nn.Parameter, Tensor], None] = _copy) -> None:
    """Set every parameter of `model` to its initial value: the authors' rules, see `_fill`.

    assign(parameter, value) receives the whole parameter as fp32 on the CPU; an engine passes one that keeps its
    shard. The parameters must have storage (not the meta device). Raises ValueError for a parameter without a rule.
    """
    for name, parameter in model.named_parameters():
        assign(parameter, initial_value(model, name, seed))


@torch.no_grad()
def initial_value(model: nn.Module, name: str, seed: int) -> Tensor:
    """Return what `init_weights` gives to the whole parameter `name`, in fp32 on the CPU."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    value = torch.empty(module.get_parameter(leaf).shape, dtype=torch.float32, device="cpu")
    path = [*owner.split("."), leaf]
    if path[-2:] == ["gates", "bias"]:
        offset = model.get_submodule(".".join(path[:-2])).gate_offset
        assert isinstance(offset, float), "Block and VideoBlock"
        return value.fill_(0.0 - offset)
    _fill(value, module, path, _generator(seed, f"{owner}.{leaf}"))
    return value


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "big"))


def _fill(value: Tensor, module: nn.Module, path: list[str], generator: torch.Generator) -> None:
    """Fill `value` with the initial value of the parameter at `path` of `module`.

    Linear maps and convolutions are xavier uniform with bias 0, those in groups group by group; class and time
    embeddings and in-context tokens are N(0, 0.02). Modulation and head start at 0, and so do gates, `gate_offset` +
    bias; RMS norms start at 1. The coefficients of PoM v2 are N(0, 1), clamped to +-0.001.
    """
    owner, leaf = path[-2], path[-1]
    if isinstance(module, PoM) and leaf == "coefficients":
        value.normal_(generator=generator).clamp_(-0.001, 0.001)
        return
    if isinstance(module, RMSNorm):
        value.fill_(1.0)
        return
    if isinstance(module, InContextTokens):
        value.normal_(0.0, 0.02, generator=generator)
        return
    known = nn.Linear | nn.Conv2d | nn.Conv3d | nn.Embedding | GroupedLinear
    if not isinstance(module, known) or leaf not in ("weight", "bias"):
        raise ValueError(f"{'.'.join(path)}: no rule says how to initialise this parameter")
    if leaf == "bias" or owner in ("modulation", "gates", "head"):
        value.zero_()
    elif isinstance(module, nn.Embedding) or "time_embedding" in path:
        value.normal_(0.0, 0.02, generator=generator)
    else:
        for part in value.chunk(module.groups) if isinstance(module, GroupedLinear) else [value]:
            nn.init.xavier_uniform_(part, generator=generator)
