"""Bytes of tensor storages, exactly: what torch's operators were given and have made, and what is still alive of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageTracker(TorchDispatchMode):
    """Within the block, `peak` is the most that was alive at the end of any operator. Of all devices but meta.

    Sees neither what an operator allocates and frees within itself, nor the allocator's rounding.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        """held: tensors that are there before the block; those that no operator touches would not be noticed."""
        super().__init__()
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.live = self.peak = 0
        for tensor in held:
            self._notice(tensor)
        self._measure()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self._notice(leaf)
        self._measure()
        return result

    def _notice(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = (weakref.ref(storage, partial(self._forget, key)), 0)

    def _forget(self, key: int, _: Any) -> None:
        self.live -= self._sizes.pop(key)[1]

    def _measure(self) -> None:
        """All sizes anew: FSDP frees weights by setting the size of their storage to 0, which is no operator."""
        for key, (reference, before) in list(self._sizes.items()):
            storage = reference()
            if storage is not None and storage.nbytes() != before:
                self.live += storage.nbytes() - before
                self._sizes[key] = (reference, storage.nbytes())
        self.peak = max(self.peak, self.live)


def step_peak_bytes(step: Any, device: torch.device, held: Iterable[Tensor]) -> int:
    """Most bytes alive during step(), of those that it makes and of `held`; on a GPU the allocator's own figure.

    There, what is alive before and is not `held` does not count.
    """
    if device.type != "cuda":
        with StorageTracker(held) as tracker:
            step()
        return tracker.peak
    torch.cuda.synchronize(device)
    others = torch.cuda.memory_allocated(device) - sum(_local_bytes(tensor) for tensor in held)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - others


def _local_bytes(tensor: Tensor) -> int:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().nbytes()
