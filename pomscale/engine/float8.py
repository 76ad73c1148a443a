"""Linear maps of blocks in float8, by torchao: about twice the matmul speed of bf16 on GPUs that support it."""

from __future__ import annotations

import torch
from torch import nn

from pomscale.base.errors import InputError
from pomscale.engine.protocol import ShardableModel

try:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
except ImportError as error:
    raise InputError("compute.float8: needs torchao: pip install 'pomscale[float8]'") from error

_FIRST_CAPABILITY = (8, 9)  # Ada; H100 is (9, 0)
_MULTIPLE = 16  # both sizes of a matrix must be multiples of it for the float8 kernels


def to_float8(model: nn.Module, device: torch.device) -> None:
    """Replace the linear maps of the blocks in place; names and master weights stay as they are.

    Inputs, weights and gradients are scaled per tensor at every step. On a CPU the arithmetic is emulated, for tests.
    Raises InputError where the GPU has no float8.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        raise InputError(f"compute.float8: {torch.cuda.get_device_name(device)} has no float8; H100 and newer have")
    shardable: ShardableModel = model  # type: ignore[assignment]  # nn.Module hides attributes from protocols
    # The gradient of a weight is a sum over samples (for what is computed once per sample) or tokens of a micro-batch;
    # their number is padded with zeros where it is no multiple either.
    config = Float8LinearConfig(emulate=device.type == "cpu", pad_inner_dim=True)
    for block in shardable.blocks():
        convert_to_float8_training(block, module_filter_fn=_has_kernels, config=config)


def _has_kernels(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not (module.in_features % _MULTIPLE or module.out_features % _MULTIPLE)
