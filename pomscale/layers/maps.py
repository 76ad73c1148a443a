"""Linear maps as layers, and whether an operator of our own may do what a layer's call would do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pomscale.ops.pom import is_transformed


def is_plain(map_: nn.Module) -> bool:
    """Return whether a call of the map does what its weight and bias say, so that an operator may do it instead.

    Others are groups, float8 and adapters, and maps with hooks, as where an engine gathers weights map by map.
    """
    hooks = (map_._forward_hooks, map_._forward_pre_hooks, map_._backward_hooks, map_._backward_pre_hooks)
    return type(map_) is nn.Linear and "forward" not in vars(map_) and not any(hooks)


def serves_operators(x: Tensor) -> bool:
    """Return whether operators of our own may read x: they know neither torch.func nor autocast."""
    device = x.device.type
    return not is_transformed() and (device == "meta" or not torch.is_autocast_enabled(device))
