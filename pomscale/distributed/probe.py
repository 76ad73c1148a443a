"""Speed of this rank's device at a fixed amount of matrix products."""

from __future__ import annotations

import time

import torch
from torch import Tensor


class MatmulProbe:
    """Products of two fixed random square matrices: about 2 ms on one CPU core or a GPU of this decade.

    The matrices stay in memory: 3 MiB on a CPU, 24 MiB (bf16) or 48 MiB (fp32) on a GPU.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        size, self._num_products = (2048, 64) if device.type == "cuda" else (512, 1)
        generator = torch.Generator().manual_seed(0)
        # Random like training data: a GPU draws less power on zeros, which would hide that it throttles.
        self.a, self.b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
        self.product = torch.empty_like(self.a)
        self.num_flops = 2 * size**3 * self._num_products
        self.seconds()  # loads kernels and libraries

    def seconds(self, num_tries: int = 3) -> float:
        """Return the seconds of the fastest of a few tries, so that disturbances do not count. Waits for the device."""
        return min(self._timed() for _ in range(num_tries))

    def _timed(self) -> float:
        if self._device.type != "cuda":
            start_s = time.perf_counter()
            self._multiply()
            return time.perf_counter() - start_s
        torch.cuda.synchronize(self._device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._multiply()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def _multiply(self) -> None:
        with torch.no_grad():
            for _ in range(self._num_products):
                torch.mm(self.a, self.b, out=self.product)

    def is_right(self) -> bool:
        """Whether sixteen rows of the last product equal those of the CPU in float64, within the dtype's rounding."""
        rows = torch.arange(0, len(self.a), len(self.a) // 16)
        return _close(self.product[rows.to(self._device)], self.a[rows.to(self._device)], self.b)


def _close(product: Tensor, a: Tensor, b: Tensor) -> bool:
    expected = a.double().cpu() @ b.double().cpu()
    # bf16 has 8 bits, and fp32 on a GPU may be TF32. An entry is of the size of sqrt(n) for matrices of n.
    tolerance = 0.01 * (expected.abs() + len(b) ** 0.5)
    return bool(((product.double().cpu() - expected).abs() <= tolerance).all())  # false for NaN too
