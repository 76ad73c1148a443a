"""Kernels of the whole mixer in C++, for fp32 on a CPU: `kernels.cpp`, compiled once per machine type into a cache.

Where no compiler is found, or it fails, a warning says so once, and the kernels in PyTorch serve, which are slower: the
numbers are the same up to rounding. POMSCALE_NATIVE=0 asks for these; POMSCALE_NATIVE=1 makes a missing compiler an
error.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pomscale.ops.pom.form import Form
from pomscale.ops.pom.rotary import frequencies
from pomscale.ops.pom.whole.kernels import Rows

_SOURCE = Path(__file__).with_name("kernels.cpp")
# No -ffast-math: NaN must stay NaN.
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_MAX_DEGREE = 8  # MAX_DEGREE of kernels.cpp
_TIMEOUT_S = 120


@cache
def native_library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where PyTorch's are to serve; the decision holds for the process.

    Raises RuntimeError if they cannot be compiled and POMSCALE_NATIVE is 1, ValueError for another value than 0 or 1.
    """
    wish = os.environ.get("POMSCALE_NATIVE", "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"POMSCALE_NATIVE: expected 0 or 1, got {wish!r}")
    if wish == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: a user without a home folder
        output = getattr(error, "stderr", None) or error
        message = f"the mixer's kernels in C++ cannot be compiled or loaded: {output}"
        if wish == "1":
            raise RuntimeError(message) from error
        warnings.warn(f"{message}; those in PyTorch serve, which are slower", stacklevel=2)
        return None


def _compiled() -> Path:
    """Return the path of the library, compiled if it is not in the cache."""
    compiler = os.environ.get("CXX", "g++")
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
    ).stdout
    # A home folder may be shared by machines with other processors.
    key = "\n".join([_SOURCE.read_text(encoding="utf-8"), *_FLAGS, version, platform.machine(), _processor()])
    cache_root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = cache_root / "pomscale" / f"mixer-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Other processes may compile at the same time: each its own file, which takes the name when it is complete.
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / library.name
            command = [compiler, *_FLAGS, "-o", str(made), str(_SOURCE)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
            made.replace(library)
    return library


def _processor() -> str:
    """Return what instructions the processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@dataclass(frozen=True)
class Turns:
    """Angles of rotary positions: tables of the distinct positions of each axis, and the table's row for each token.

    index (tokens, axes) int64. Of axis a with P_a pairs, cosines and sines (fp32) hold a table (positions, P_a) that
    begins at offsets[a]; pairs and offsets (axes,) int64.
    """

    index: Tensor
    cosines: Tensor
    sines: Tensor
    pairs: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, positions: Tensor, width: int) -> Turns:
        """Return the angles of features of this width at positions (tokens, axes)."""
        found, index, pairs, offsets = [], [], [], [0]
        for axis, frequency in enumerate(frequencies(width, positions.shape[1], positions.device)):
            distinct, rows = positions[:, axis].unique(return_inverse=True)
            index.append(rows)
            found.append((distinct[:, None].float() * frequency).flatten())
            pairs.append(len(frequency))
            offsets.append(offsets[-1] + len(found[-1]))
        angles = torch.cat(found)
        sizes = torch.tensor(pairs), torch.tensor(offsets[:-1])
        return cls(torch.stack(index, dim=1), angles.cos(), angles.sin(), *sizes)


class NativeKernels:
    """Kernels in C++; `kernels.Kernels` describes the methods. turns: those of the context, with rope alone."""

    def __init__(
        self, library: ctypes.CDLL, form: Form, coefficients: Tensor | None, turns: Turns | None = None
    ) -> None:
        self._library, self._degree, self._turns = library, form.degree, turns
        self._is_product = form.name == "product"
        self._columns = None if coefficients is None else coefficients.detach().t().contiguous()
        self._threads = torch.get_num_threads()

    @staticmethod
    def serve(form: Form, dtype: torch.dtype, device: torch.device, *, folds: bool) -> bool:
        """Return whether they have these operands."""
        return (
            device.type == "cpu"
            and dtype == torch.float32
            and form.degree <= _MAX_DEGREE
            # Where gates read folded maps, they meet no channels: PyTorch makes those of heads, and turns them.
            and (folds or (form.heads == 1 and form.rope is None))
        )

    def add_features(self, u: Tensor, rows: Rows, total: Tensor) -> None:
        self._features(u, rows, None, total)

    def features(self, u: Tensor, rows: Rows, out: Tensor) -> None:
        self._features(u, rows, out, None)

    def features_backward(self, u: Tensor, rows: Rows, dh: Tensor, du: Tensor, dcoefficients: Tensor | None) -> None:
        operands = self._operands(u, rows)
        gradient = _pointer(dh), _stride(dh), _pointer(du)
        if self._is_product:
            self._library.product_backward(*operands, *gradient, *self._sizes(u), *self._tail())
            return
        run = self._library.coefficient_backward if self._turns is None else self._library.rotary_backward
        columns = None if dcoefficients is None else torch.zeros_like(dcoefficients.t(), memory_format=_CONTIGUOUS)
        run(*operands, *gradient, _pointer(columns), *self._sizes(u), *self._tail())
        if dcoefficients is not None and columns is not None:
            dcoefficients += columns.t()

    def select(self, gate: Tensor, rows: Rows, mean: Tensor, out: Tensor) -> None:
        tensors = _pointer(gate), _pointer(mean), _stride(mean), _pointer(out)
        self._library.select_means(*tensors, *self._sizes(gate), self._is_product, self._threads)

    def select_backward(
        self, gate: Tensor, rows: Rows, mean: Tensor, out: tuple[Tensor, Tensor, Tensor], dmean: Tensor
    ) -> None:
        stride = _int(0 if dmean.dim() == 1 else dmean.shape[1])
        tensors = _pointer(gate), _pointer(mean), stride, *(_pointer(t) for t in out), _pointer(dmean)
        self._library.select_means_backward(*tensors, *self._sizes(gate), self._is_product, self._threads)

    def running_means(self, h: Tensor, carry: Tensor, offset: int) -> None:
        self._library.running_means(_pointer(h), _pointer(carry), _int(offset), *self._sizes(h), self._threads)

    def running_means_backward(self, dmean: Tensor, carry: Tensor, offset: int) -> None:
        tensors = _pointer(dmean), _pointer(carry), _int(offset)
        self._library.running_means_backward(*tensors, *self._sizes(dmean), self._threads)

    def _features(self, u: Tensor, rows: Rows, h: Tensor | None, total: Tensor | None) -> None:
        if self._is_product:
            run = self._library.product_features
        else:
            run = self._library.coefficient_features if self._turns is None else self._library.rotary_features
        run(*self._operands(u, rows), _pointer(h), _pointer(total), *self._sizes(u), *self._tail())

    def _operands(self, u: Tensor, rows: Rows) -> list[Any]:
        operands: list[Any] = [_pointer(u), _pointer(rows.takes_part)]
        if not self._is_product:
            operands.append(_pointer(self._columns))
        if self._turns is not None:
            turns = self._turns
            tensors = rows.turns, turns.cosines, turns.sines, turns.pairs, turns.offsets
            operands += [*(_pointer(tensor) for tensor in tensors), _int(len(turns.pairs))]
        return operands

    def _tail(self) -> tuple[ctypes.c_int64, int]:
        return _int(self._degree), self._threads

    def _sizes(self, rows: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
        return _int(rows.shape[0]), _int(rows.shape[1])


_CONTIGUOUS = torch.contiguous_format
_int = ctypes.c_int64


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _stride(rows: Tensor) -> ctypes.c_int64:
    """Return the distance of rows, 0 where one is for all."""
    return _int(0 if rows.shape[0] == 1 else rows.shape[1])
