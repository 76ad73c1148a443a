"""Memory for batches that is used again once nobody looks at it any more.

A fresh array of a few MB costs as much as filling it: the kernel hands out its pages one by one, zeroed.
"""

from __future__ import annotations

import sys
import threading

import numpy as np
import torch
from torch import Tensor

# More batches than a loader has under way at once; beyond, memory is simply fresh.
_MAX_KEPT = 16

# What `sys.getrefcount` gives for an array that only the list, the loop and the call itself hold.
_REFERENCES_OF_OURS = 3


class Recycler:
    """Hands out float32 memory. Safe to share between threads.

    A tensor made from an array holds it for as long as the tensor, or any view of its memory, lives: CPython's count of
    references to the array says when that is over.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._lock = threading.Lock()

    def empty(self, num_rows: int, num_columns: int) -> Tensor:
        """(num_rows, num_columns) float32, with anything in it."""
        size = num_rows * num_columns
        with self._lock:
            for array in self._arrays:
                if array.size == size and sys.getrefcount(array) == _REFERENCES_OF_OURS:
                    return torch.from_numpy(array).view(num_rows, num_columns)
            fresh = np.empty(size, np.float32)
            self._arrays = [*self._arrays[-_MAX_KEPT + 1 :], fresh]
            return torch.from_numpy(fresh).view(num_rows, num_columns)
