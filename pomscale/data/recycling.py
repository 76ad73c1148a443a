"""Memory for batches that is used again once nobody looks at it any more.

A fresh array of a few MB costs as much as filling it: the kernel hands out its pages one by one, zeroed.
"""

from __future__ import annotations

import sys
import threading

import numpy as np
import torch
from torch import Tensor

# Arrays that stay, when a fresh one is made, of those that nobody looks at: they are of other sizes, and batches of
# several shapes and the last, smaller pieces of steps take turns. Arrays in use cost nothing: they are alive anyway.
_MAX_IDLE = 16

# What `sys.getrefcount` gives for an array that only the list, the loop and the call itself hold.
_REFERENCES_OF_OURS = 3


class Recycler:
    """Hands out float32 memory. Safe to share between threads.

    A tensor made from an array holds it for as long as the tensor, or any view of its memory, lives: CPython's count of
    references to the array says when that is over. Memory is at most that of all batches that were in use at one time,
    and of _MAX_IDLE more.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._lock = threading.Lock()

    def empty(self, num_rows: int, num_columns: int) -> Tensor:
        """(num_rows, num_columns) float32, with anything in it."""
        size = num_rows * num_columns
        with self._lock:
            in_use: list[np.ndarray] = []
            idle: list[np.ndarray] = []
            for array in self._arrays:
                is_idle = sys.getrefcount(array) == _REFERENCES_OF_OURS
                if is_idle and array.size == size:
                    return torch.from_numpy(array).view(num_rows, num_columns)
                (idle if is_idle else in_use).append(array)
            fresh = np.empty(size, np.float32)
            self._arrays = [*idle[-_MAX_IDLE:], *in_use, fresh]
            return torch.from_numpy(fresh).view(num_rows, num_columns)
