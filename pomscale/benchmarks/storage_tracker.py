"""Exact bytes of the live tensor storages that torch's operators were given or have made."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageTracker(TorchDispatchMode):
    """Tracker of storages on all devices but meta: `peak` is the most alive at the end of any operator in the block.

    It sees neither what an operator of torch allocates and frees within itself, nor the allocator's rounding. It sees
    what pomscale's own operators do.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        """Track `held`, too: tensors from before the block, which are not noticed until an operator touches them."""
        super().__init__()
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._depth = 0
        self.live = self.peak = 0
        for tensor in held:
            self._notice(tensor)
        self.peak = self.live

    def __enter__(self) -> Self:
        if not self._depth:
            _watch_resizes(self._measure)
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._depth -= 1
        if not self._depth:
            del torch.UntypedStorage.resize_
            alive = [storage for reference, _ in self._sizes.values() if (storage := reference()) is not None]
            if raised[0] is None and sum(storage.nbytes() for storage in alive) != self.live:
                raise RuntimeError("a storage has changed its size without an operator and without resize_")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pomscale":
            result = self._run_inside(func, args, kwargs or {})
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_iter((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self._notice(leaf)
        self.peak = max(self.peak, self.live)
        return result

    def _run_inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator that is written in operators of torch, and track these."""
        device = next(leaf.device for leaf in tree_iter(args) if isinstance(leaf, Tensor))
        key = torch._C.DispatchKey.CUDA if device.type == "cuda" else torch._C.DispatchKey.CPU
        with self, torch.no_grad():
            return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)

    def _notice(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = (weakref.ref(storage, partial(self._forget, key)), 0)
        self._measure(storage)

    def _forget(self, key: int, _: Any) -> None:
        self.live -= self._sizes.pop(key)[1]

    def _measure(self, storage: torch.UntypedStorage) -> None:
        """Measure a storage that has been noticed; its size may have changed."""
        if storage._cdata in self._sizes:
            reference, before = self._sizes[storage._cdata]
            self._sizes[storage._cdata] = (reference, storage.nbytes())
            self.live += storage.nbytes() - before


def _watch_resizes(resized: Callable[[torch.UntypedStorage], None]) -> None:
    """Have every storage reported that is resized: FSDP frees weights so, without an operator."""
    resize = torch.UntypedStorage.resize_

    def reporting(storage: torch.UntypedStorage, *arguments: Any) -> Any:
        result = resize(storage, *arguments)
        resized(storage)
        return result

    torch.UntypedStorage.resize_ = reporting  # type: ignore[method-assign, assignment]


def step_peak_bytes(step: Any, device: torch.device, held: Iterable[Tensor]) -> int:
    """Return the most bytes alive during step(), of storages that it makes and of `held`.

    On a GPU it is the allocator's own figure, less what was alive before and is not `held`.
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
