"""Operands of the mixer after its first linear maps: what is read, and what reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pomscale.ops.pom.form import Form
from pomscale.ops.pom.rotary import check_positions


@dataclass(frozen=True)
class Context:
    """Tokens that are read.

    u: (b n Wu) floating, pre-activations. form: the polynomial and the gates of those that read it.
    coefficients: (D k), of the coefficient form alone. positions: (n axes) or (b n axes) integers, with rope alone.
    """

    u: Tensor
    form: Form
    coefficients: Tensor | None = None
    positions: Tensor | None = None

    @property
    def num_features(self) -> int:
        """W, the number of features of a token, and channels of the state."""
        return self.form.num_features(self.u.shape[2])

    def split(self, lengths: Sequence[int]) -> list[Context]:
        """Cut the tokens into parts of these lengths.

        The backward pass of a split joins the gradients of all parts; that of a slice writes the whole for each part.
        """
        us, positions = self.u.split(list(lengths), dim=1), split_positions(self.positions, lengths)
        return [replace(self, u=u, positions=part) for u, part in zip(us, positions, strict=True)]

    def without(self, takes_part: Tensor) -> Context:
        """Set u to 0 at tokens outside `takes_part` (b n); all features of u = 0 vanish.

        Filling rather than multiplying keeps a NaN in a padded token out of the sums and out of the gradients.
        """
        return replace(self, u=self.u.masked_fill(~takes_part[..., None], 0.0))


@dataclass(frozen=True)
class Queries:
    """Tokens that read.

    gate: (b m G), logits of the gates, G = `Form.num_gates`. positions: (m axes) or (b m axes) integers, with rope.
    output: (d W), weight of the linear map that follows the mixer. With it the result is y output^T, and where heads
        share a state among many queries the map is applied to the state instead of to every query.
    """

    gate: Tensor
    positions: Tensor | None = None
    output: Tensor | None = None

    def part(self, start: int, stop: int) -> Queries:
        """Return queries start .. stop - 1."""
        positions = None if self.positions is None else self.positions[..., start:stop, :]
        return replace(self, gate=self.gate[:, start:stop], positions=positions)

    def split(self, lengths: Sequence[int]) -> list[Queries]:
        """Cut the queries into parts of these lengths."""
        gates, positions = self.gate.split(list(lengths), dim=1), split_positions(self.positions, lengths)
        return [replace(self, gate=gate, positions=part) for gate, part in zip(gates, positions, strict=True)]


def split_positions(positions: Tensor | None, lengths: Sequence[int]) -> Sequence[Tensor | None]:
    """Cut positions (.. n axes) into parts of these lengths."""
    return [None] * len(lengths) if positions is None else positions.split(list(lengths), dim=-2)


def check_tokens(x: Tensor, context: Tensor, dim: int) -> None:
    """Raise ValueError unless a layer of width `dim` can let x read context."""
    for name, tokens, length in (("x", x, "m"), ("context", context, "n")):
        if tokens.dim() != 3 or tokens.shape[2] != dim:
            raise ValueError(f"{name}: expected shape (b {length} {dim}), got {tuple(tokens.shape)}")
    if x.shape[0] != context.shape[0]:
        raise ValueError(f"context: expected {x.shape[0]} samples as in x, got shape {tuple(context.shape)}")


def check_operands(context: Context, queries: Queries) -> None:
    """Raise ValueError, with the shapes expected and got, unless the operands fit together."""
    u, gate, form = context.u, queries.gate, context.form
    if u.dim() != 3 or gate.dim() != 3 or u.shape[0] != gate.shape[0]:
        raise ValueError(f"expected u (b n c) and gate (b m g) of one b, got {tuple(u.shape)} and {tuple(gate.shape)}")
    num_features = context.num_features
    num_gates = form.num_gates(num_features)
    if gate.shape[2] != num_gates:
        raise ValueError(f"gate: expected (b m {num_gates}) for u {tuple(u.shape)}, got {tuple(gate.shape)}")
    coefficients = context.coefficients
    if form.name == "product":
        if coefficients is not None:
            raise ValueError(f"coefficients: expected None in the product form, got {tuple(coefficients.shape)}")
    elif coefficients is None or tuple(coefficients.shape) != (num_features, form.degree):
        got = None if coefficients is None else tuple(coefficients.shape)
        raise ValueError(f"coefficients: expected shape {(num_features, form.degree)}, got {got}")
    output = queries.output
    if output is not None and (output.dim() != 2 or output.shape[1] != num_features):
        raise ValueError(f"output: expected shape (d, {num_features}), got {tuple(output.shape)}")
    check_positions("positions", queries.positions, form.rope, gate.shape[0], gate.shape[1])
    check_positions("context positions", context.positions, form.rope, u.shape[0], u.shape[1])
