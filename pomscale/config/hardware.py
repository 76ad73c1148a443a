"""Data sheets of GPUs, for plans and measurements alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Precision: TypeAlias = Literal["fp32", "bf16"]

# Peak FLOP/s without sparsity, from NVIDIA's data sheets (A100 80 GB; H100 and H200 Tensor Core GPU; Blackwell
# architecture technical brief, HGX B200). bf16 is the tensor cores' figure with fp32 accumulation, fp32 that of the
# CUDA cores (TF32 off, torch's default). First match wins, so variants stand before their family.
_PEAK_FLOPS: tuple[tuple[str, dict[Precision, float]], ...] = (
    ("A100", {"bf16": 312e12, "fp32": 19.5e12}),
    ("H100 NVL", {"bf16": 835e12, "fp32": 60e12}),
    ("H100 PCIe", {"bf16": 756e12, "fp32": 51e12}),
    ("H100", {"bf16": 989e12, "fp32": 67e12}),
    ("H200 NVL", {"bf16": 835e12, "fp32": 60e12}),
    ("H200", {"bf16": 989e12, "fp32": 67e12}),
    ("B200", {"bf16": 2250e12, "fp32": 80e12}),
)


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Return the dense peak in FLOP/s of a device, named as by torch.cuda.get_device_name().

    None for a CPU or an unknown device.
    """
    return next((peaks[precision] for name, peaks in _PEAK_FLOPS if name in device_name), None)


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU that runs are planned for.

    memory_gib is the memory that torch can use, which is less than the name of the GPU says.
    """

    name: str
    memory_gib: float
    has_float8: bool

    def peak(self, precision: Precision) -> float:
        """Return the dense peak in FLOP/s."""
        peak = peak_flops(self.name, precision)
        assert peak is not None
        return peak


GPUS: dict[str, Gpu] = {
    "a100": Gpu("A100", 79.2, has_float8=False),
    "h100": Gpu("H100", 79.1, has_float8=True),
    "h200": Gpu("H200", 139.8, has_float8=True),
}
