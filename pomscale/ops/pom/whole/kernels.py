"""Elementwise work on the rows of a chunk, in plain PyTorch; another backend offers the same methods.

Rows are processed in small blocks, in the dtype of the sums, so that temporary tensors stay small and bf16 inputs are
rounded once, where a result is stored. Equations are in the package's README.md, section "Backward".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pomscale.ops.pom.form import Form
from pomscale.ops.pom.rotary import cos_sin, rotate


@dataclass(frozen=True)
class Rows:
    """What belongs to rows beside their values: takes_part (r,) bool, positions (r axes); None = all, no rope.

    turns (r axes) int64 are the rows of `native.Turns` that positions stand for, where the kernels in C++ serve.
    """

    takes_part: Tensor | None = None
    positions: Tensor | None = None
    turns: Tensor | None = None

    def part(self, start: int, stop: int) -> Rows:
        """Return rows start .. stop - 1."""
        of_rows = (self.takes_part, self.positions, self.turns)
        return Rows(*(None if values is None else values[start:stop] for values in of_rows))


class Kernels(Protocol):
    """Elementwise work of one mixer. W features, G gates; sums, means and their gradients have the dtype of sums."""

    def add_features(self, u: Tensor, rows: Rows, total: Tensor) -> None:
        """Add the features of u (r Wu) to total (W)."""

    def features(self, u: Tensor, rows: Rows, out: Tensor) -> None:
        """Write the features of u (r Wu) to out (r W)."""

    def features_backward(self, u: Tensor, rows: Rows, dh: Tensor, du: Tensor, dcoefficients: Tensor | None) -> None:
        """Write the gradient of u to du (r Wu), which may be u, given that of the features, dh (r W) or (1 W).

        That of the coefficients is added to dcoefficients (W k).
        """

    def select(self, gate: Tensor, rows: Rows, mean: Tensor, out: Tensor) -> None:
        """Write s o H to out (r W), given logits gate (r G) and means (r W) or (1 W)."""

    def select_backward(
        self, gate: Tensor, rows: Rows, mean: Tensor, out: tuple[Tensor, Tensor, Tensor], dmean: Tensor
    ) -> None:
        """Differentiate `select` from its gradient dy (r W), where out = (dy, selected, dgate).

        Writes s o H to selected (r W), which may be gate, and the gradient of gate to dgate (r G), which may be dy.
        That of the means is written to dmean (r W), which may be mean, where there are r means; else added to (W).
        """

    def running_means(self, h: Tensor, carry: Tensor, offset: int) -> None:
        """Replace h (r W) by (carry + h_1 + .. + h_i) / (offset + i), and carry (W) by carry + h_1 + .. + h_r."""

    def running_means_backward(self, dmean: Tensor, carry: Tensor, offset: int) -> None:
        """Replace dmean (r W) by q_i = q_(i+1) + dmean_i / (offset + i), q_(r+1) = carry, and carry (W) by q_1."""


class TorchKernels:
    """Kernels of any form, dtype and device."""

    def __init__(self, form: Form, coefficients: Tensor | None, sums: torch.dtype, device: torch.device) -> None:
        self._form, self._sums = form, sums
        self._columns = None if coefficients is None else coefficients.to(sums).unbind(1)
        # Small blocks stay in a CPU's cache; a GPU needs more to be busy.
        self._block_rows = 64 if device.type == "cpu" else 256

    def add_features(self, u: Tensor, rows: Rows, total: Tensor) -> None:
        for block in self._blocks(u):
            total += self._features(u[block], rows.part(block.start, block.stop)).sum(0)

    def features(self, u: Tensor, rows: Rows, out: Tensor) -> None:
        for block in self._blocks(u):
            out[block] = self._features(u[block], rows.part(block.start, block.stop))

    def features_backward(self, u: Tensor, rows: Rows, dh: Tensor, du: Tensor, dcoefficients: Tensor | None) -> None:
        for block in self._blocks(u):
            part = rows.part(block.start, block.stop)
            values, gradient = self._values(u[block], part), dh if dh.shape[0] == 1 else dh[block]
            if part.positions is not None:
                gradient = self._rotated(gradient, part.positions, back=True)
            if self._columns is None:
                found = self._product_backward(values, gradient)
            else:
                found = self._coefficients_backward(values, gradient, dcoefficients)
            if part.takes_part is not None:
                found.masked_fill_(~part.takes_part[:, None], 0.0)
            du[block] = found

    def select(self, gate: Tensor, rows: Rows, mean: Tensor, out: Tensor) -> None:
        for block in self._blocks(gate):
            gates = self.gates(gate[block], rows.part(block.start, block.stop), mean.shape[1])
            out[block] = self._of_channels(gates, mean.shape[1]) * (mean if mean.shape[0] == 1 else mean[block])

    def select_backward(
        self, gate: Tensor, rows: Rows, mean: Tensor, out: tuple[Tensor, Tensor, Tensor], dmean: Tensor
    ) -> None:
        dy, selected, dgate = out
        for block in self._blocks(gate):
            part, logits, gradient = rows.part(block.start, block.stop), gate[block], dy[block].to(self._sums)
            gates = self.gates(logits, part, mean.shape[1])
            of_channels = self._of_channels(gates, mean.shape[1])
            means = mean if mean.shape[0] == 1 else mean[block]
            dgates, dmeans, values = gradient * means, gradient * of_channels, of_channels * means
            if gates.shape[1] != mean.shape[1]:
                dgates = dgates.unflatten(1, (gates.shape[1], -1)).sum(2)
            # Results may lie where operands did, so all are computed before any is stored.
            dgate[block], selected[block] = self.gates_backward(logits, part, dgates, mean.shape[1]), values
            if dmean.dim() == 1:
                dmean += dmeans.sum(0)
            else:
                dmean[block] = dmeans

    def running_means(self, h: Tensor, carry: Tensor, offset: int) -> None:
        totals = h.cumsum(0) + carry
        carry.copy_(totals[-1])
        h.copy_(totals / self._counts(h, offset))

    def running_means_backward(self, dmean: Tensor, carry: Tensor, offset: int) -> None:
        totals = (dmean / self._counts(dmean, offset)).flip(0).cumsum(0).flip(0) + carry
        carry.copy_(totals[0])
        dmean.copy_(totals)

    def gates(self, gate: Tensor, rows: Rows, num_features: int) -> Tensor:
        """Return s (r G) of logits gate (r G) of any dtype, in that of the sums."""
        logits = gate.to(self._sums)
        if self._form.name == "product":
            return torch.sigmoid(logits)
        gates = F.hardsigmoid(logits)
        if rows.positions is not None:
            gates = self._rotated(gates, rows.positions, self._head_width(num_features))
        return gates

    def gates_backward(self, gate: Tensor, rows: Rows, gradient: Tensor, num_features: int) -> Tensor:
        """Return the gradient of the logits gate (r G), given that of s (r G)."""
        logits = gate.to(self._sums)
        if self._form.name == "product":
            s = torch.sigmoid(logits)
            return gradient * s * (1 - s)
        if rows.positions is not None:
            gradient = self._rotated(gradient, rows.positions, self._head_width(num_features), back=True)
        return torch.ops.aten.hardsigmoid_backward(gradient, logits)

    def _head_width(self, num_features: int) -> int | None:
        return None if self._form.heads == 1 else num_features // self._form.heads

    def _of_channels(self, gates: Tensor, num_features: int) -> Tensor:
        repeats = num_features // gates.shape[1]
        return gates if repeats == 1 else gates.repeat_interleave(repeats, 1)

    def _rotated(self, x: Tensor, positions: Tensor, head_width: int | None = None, *, back: bool = False) -> Tensor:
        assert self._form.rope is not None
        tables = cos_sin(positions, x.shape[1], self._form.rope, head_width=head_width)
        return rotate(x, [(cos, -sin if back else sin) for cos, sin in tables])

    def _counts(self, rows: Tensor, offset: int) -> Tensor:
        return torch.arange(offset + 1, offset + 1 + rows.shape[0], dtype=self._sums, device=rows.device)[:, None]

    def _blocks(self, rows: Tensor) -> Iterator[slice]:
        for start in range(0, rows.shape[0], self._block_rows):
            yield slice(start, min(start + self._block_rows, rows.shape[0]))

    def _values(self, u: Tensor, rows: Rows) -> Tensor:
        values = u.to(self._sums)
        # All features of u = 0 vanish, and filling keeps a NaN in a padded token out of the sums.
        return values if rows.takes_part is None else values.masked_fill(~rows.takes_part[:, None], 0.0)

    def _features(self, u: Tensor, rows: Rows) -> Tensor:
        values = self._values(u, rows)
        if self._columns is None:
            h = F.gelu(values)
            pieces = h.chunk(self._form.degree, dim=1)
            for before, piece in pairwise(pieces):
                piece.mul_(before)
            return h
        v = F.leaky_relu(values, 0.01).clamp_(-0.1, 6.0)
        *lower, highest = self._columns
        h = v * highest
        for coefficient in reversed(lower):  # Horner's scheme
            h = h.add_(coefficient).mul_(v)
        return h if rows.positions is None else self._rotated(h, rows.positions)

    def _product_backward(self, u: Tensor, dh: Tensor) -> Tensor:
        a = F.gelu(u)
        pieces, gradients = a.chunk(self._form.degree, 1), dh.chunk(self._form.degree, 1)
        products = [pieces[0]]
        for piece in pieces[1:-1]:
            products.append(products[-1] * piece)
        da = torch.empty_like(u)
        parts, q = da.chunk(self._form.degree, 1), gradients[-1]
        for j in range(self._form.degree - 1, 0, -1):  # q = gradient of everything that flows through h_(j+1)
            torch.mul(q.expand_as(parts[j]), products[j - 1], out=parts[j])
            q = gradients[j - 1] + q * pieces[j]
        parts[0].copy_(q)
        return torch.ops.aten.gelu_backward(da, u)

    def _coefficients_backward(self, u: Tensor, dh: Tensor, dcoefficients: Tensor | None) -> Tensor:
        assert self._columns is not None
        activated = F.leaky_relu(u, 0.01)
        v = activated.clamp(-0.1, 6.0)
        if dcoefficients is not None:
            power = v
            for m in range(len(self._columns)):
                power = power if m == 0 else power * v
                dcoefficients[:, m] += (power * dh).sum(0)
        slope = torch.zeros_like(v)
        for m in range(len(self._columns), 0, -1):
            slope = slope.mul_(v).add_(self._columns[m - 1] * m)
        # A clamp passes gradients at its limits, too.
        dv = slope.mul_(dh).mul_((activated >= -0.1) & (activated <= 6.0))
        return torch.ops.aten.leaky_relu_backward(dv, u, 0.01, False)
