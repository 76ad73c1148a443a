"""Operands of the whole mixer: tokens before its linear maps, the weights of these, and buffers for chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pomscale.ops.pom.form import Form
from pomscale.ops.pom.state import accumulation_dtype
from pomscale.ops.pom.whole.kernels import Kernels, Rows, TorchKernels
from pomscale.ops.pom.whole.layout import Chunk, Layout, Run
from pomscale.ops.pom.whole.native import NativeKernels, Turns, native_library

Memory: TypeAlias = Literal["fast", "lean"]
"""What is kept for the backward pass beside the inputs: u and the gates (fast), or neither (lean)."""


@dataclass(frozen=True)
class Weights:
    """Weights of the three linear maps, as of nn.Linear, and the coefficients (W k) of that form.

    projection (Wu d_context), gate (G d), output (d_out W), each with a bias or None.
    """

    projection: Tensor
    projection_bias: Tensor | None
    gate: Tensor
    gate_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    coefficients: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        """Return all of them, in the order of the constructor."""
        return list(vars(self).values())


@dataclass(frozen=True)
class Call:
    """One call of the mixer on flat tokens.

    x (b m, d), context (b n, d_context), which is x for a self mixer. takes_part (b n,) bool is the padding mask,
    positions (b m, axes), context_positions (b n, axes).
    """

    x: Tensor
    context: Tensor
    weights: Weights
    form: Form
    layout: Layout
    takes_part: Tensor | None
    positions: Tensor | None
    context_positions: Tensor | None

    @property
    def num_features(self) -> int:
        """W."""
        return self.weights.output.shape[1]

    @property
    def folds(self) -> bool:
        """Whether the output map is applied to states and not to queries."""
        return self.layout.folds(self.form.heads)

    @property
    def sums(self) -> torch.dtype:
        """Dtype of sums over tokens."""
        return accumulation_dtype(self.x.dtype)

    @cached_property
    def torch_kernels(self) -> TorchKernels:
        """Kernels in PyTorch, for what the native ones do not have."""
        return TorchKernels(self.form, self.weights.coefficients, self.sums, self.x.device)

    @cached_property
    def kernels(self) -> Kernels:
        """Kernels for the rows of a chunk.

        Those in C++ serve fp32 on a CPU, where a compiler is found; all else is PyTorch's. The operands that decide
        are the same in the forward and in the backward pass.
        """
        serves = NativeKernels.serve(self.form, self.x.dtype, self.x.device, folds=self.folds)
        library = native_library() if serves else None
        if library is None:
            return self.torch_kernels
        return NativeKernels(library, self.form, self.weights.coefficients, self._context_turns)

    @cached_property
    def _context_turns(self) -> Turns | None:
        positions = self.context_positions
        return None if positions is None else Turns.of(positions, self.num_features)

    @cached_property
    def _all_context_rows(self) -> Rows:
        turns = self._context_turns if isinstance(self.kernels, NativeKernels) else None
        return Rows(self.takes_part, self.context_positions, None if turns is None else turns.index)

    def context_rows(self, run: Run) -> Rows:
        """Return what belongs to a run of the context."""
        return self._all_context_rows.part(run.start, run.stop)

    def query_rows(self, run: Run | Chunk) -> Rows:
        """Return what belongs to the queries of a run or of a chunk."""
        return Rows(None, self.positions).part(run.start, run.stop)

    def context_chunk(self, start: int, stop: int) -> Tensor:
        """Return rows of the context, 0 where they take no part: a NaN would reach the gradient of the weights."""
        rows = self.context[start:stop]
        if self.takes_part is None:
            return rows
        return rows.masked_fill(~self.takes_part[start:stop, None], 0.0)


def linear_(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write x weight^T + bias to `out` and return it."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


class Gradient:
    """Sum over chunks of the gradients of a linear map's weight and bias, in the dtype of sums."""

    def __init__(self, weight: Tensor, bias: Tensor | None, needed: Sequence[bool], sums: torch.dtype) -> None:
        self._like = weight, bias
        self.weight = torch.zeros_like(weight, dtype=sums, memory_format=torch.contiguous_format) if needed[0] else None
        self.bias = torch.zeros_like(bias, dtype=sums) if needed[1] and bias is not None else None

    def add(self, dy: Tensor, x: Tensor) -> None:
        """Add the gradients that rows x (r i) and dy (r o) give."""
        if self.weight is not None:
            if self.weight.dtype == x.dtype:
                self.weight.addmm_(dy.t(), x)
            else:  # a product of bf16 rows is summed in fp32 and rounded once per chunk; the sum over chunks is fp32
                self.weight += dy.t() @ x
        if self.bias is not None:
            self.bias += dy.sum(0, dtype=self.bias.dtype)

    def results(self) -> list[Tensor | None]:
        """Return the gradients of weight and bias in the dtypes of these; None for one that is not needed."""
        return [
            None if found is None or like is None else found.to(like.dtype)
            for found, like in zip((self.weight, self.bias), self._like, strict=True)
        ]
