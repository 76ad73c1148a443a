"""The mixers of `pomscale.layers`, line by line, on tensors that have sizes but no values."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from pomscale.config.mixer import AttentionMixer, Mixer, PomMixer, rotary_pairs
from pomscale.plan.shadow import operators as op
from pomscale.plan.shadow.operators import FP32, Weight
from pomscale.plan.shadow.tensor import Tensor


class Linear:
    def __init__(self, inputs: int, outputs: int, bias: bool = True, stacked: int = 1) -> None:
        self.weight, self.bias = Weight((outputs, inputs), stacked), Weight((outputs,)) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return op.linear(x, self.weight, self.bias)

    def weights(self) -> list[Weight]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


class GroupedLinear:
    """Linear map in groups of layers/pom.py, without bias."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        self.weight, self.groups = Weight((outputs, inputs // groups), groups), groups

    def __call__(self, x: Tensor) -> Tensor:
        return op.grouped_linear(x, self.weight, self.groups)

    def weights(self) -> list[Weight]:
        return [self.weight]


PADDING: Literal["padding"] = "padding"

Mask: TypeAlias = Literal["padding"] | int | None
"""Mask of a mixer: padding of its context, or block-causal over a number of frame groups."""

Table: TypeAlias = tuple[Tensor, Tensor]


class PoM:
    """Mixer of layers/pom.py: ops/pom/whole with a `memory`, else layered as in ops/pom/torch_path.py."""

    memory: Literal["fast", "lean"] | None = None
    block_rows = 0

    def __init__(self, dim: int, mixer: PomMixer) -> None:
        width, is_product = mixer.width(dim), mixer.form == "product"
        self.mixer = mixer
        self.coefficients = None if is_product else Weight((width, mixer.degree))
        self.projection = (
            Linear(dim, width, bias=is_product, stacked=mixer.degree if is_product else 1)
            if mixer.groups == 1
            else GroupedLinear(dim, width, mixer.groups)
        )
        self.gate, self.output = Linear(dim, mixer.num_gates(dim)), Linear(width, dim, bias=is_product)

    def __call__(
        self, x: Tensor, context: Tensor | None = None, mask: Mask = None, positions: Tensor | None = None
    ) -> Tensor:
        if self.memory is not None and isinstance(self.projection, Linear):
            num_states = x.shape[0] * (mask if isinstance(mask, int) else 1)
            how = {"keep": self.memory == "fast", "masked": mask == PADDING}
            maps = (self.projection, self.gate, self.output)
            width, num_gates, d_out = (linear.weight.shape[0] for linear in maps)
            return op.whole_mixer(
                x,
                context,
                self.weights(),
                (width, num_gates, d_out),
                num_states,
                **how,
                block_rows=self.block_rows,
            )
        u = self.projection(x if context is None else context)
        gate = self.gate(x)
        if isinstance(mask, int):
            return self.read_block_causal(u, gate, mask, positions)
        return self.read(u, gate, mask, positions)

    def read(self, u: Tensor, gate: Tensor, mask: Literal["padding"] | None, positions: Tensor | None) -> Tensor:
        taking_part = u if mask is None else op.scaled(u)
        sums = op.concatenate([op.sum_tokens(piece) for piece in self.features(taking_part, positions)])
        del taking_part
        return self.select(gate, op.scaled(sums), positions)

    def read_block_causal(self, u: Tensor, gate: Tensor, num_groups: int, positions: Tensor | None) -> Tensor:
        batch, num_tokens, _ = u.shape
        sums = op.concatenate(
            [
                op.concatenate(
                    [op.sum_tokens(op.view(piece, batch, num_groups, num_tokens // num_groups, piece.shape[-1]))]
                )
                for piece in self.features(u, positions)
            ]
        )
        return self.select(gate, op.scaled(op.scaled(sums)), positions)

    def features(self, u: Tensor, positions: Tensor | None) -> list[Tensor]:
        if self.coefficients is None:
            pieces = op.chunk(op.activation(u), self.mixer.degree)
            products = [pieces[0]]
            for piece in pieces[1:]:
                products.append(products[-1] * piece)
            return products
        v = op.clamp(op.activation(u))
        *lower, highest = op.unbind(self.coefficients)
        h = v * highest
        for coefficient in reversed(lower):
            h = (h + coefficient) * v
        return [h if positions is None else self.rotated(h, positions)]

    def gates(self, gate: Tensor, positions: Tensor | None) -> Tensor:
        if self.coefficients is None:
            return op.sigmoid(gate)
        gates = op.activation(gate)
        return gates if positions is None else self.rotated(gates, positions)

    def select(self, gate: Tensor, mean: Tensor, positions: Tensor | None) -> Tensor:
        """Map a mean (b 1 W) or (b f 1 W), each read by the queries of its frame -> (b m d)."""
        gates = self.gates(gate, positions)
        mean = op.cast(mean, gate.itemsize)
        (batch, num_queries, num_gates), heads = gates.shape, self.mixer.heads
        num_frames = math.prod(mean.shape[1:-1])
        of_frame = num_queries // num_frames
        gates = op.view(gates, batch, num_frames, of_frame, num_gates)
        if self.mixer.folds(of_frame):
            assert self.output.bias is None
            output, dim = self.output.weight.read(), self.output.weight.shape[0]
            folded = op.matrix_product(mean, output, (batch, num_frames, heads, dim))
            return op.view(
                op.matrix_product(gates, folded, (batch, num_frames, of_frame, dim)), batch, num_queries, dim
            )
        if heads > 1:
            gates = op.view(gates, *gates.shape, 1)
        selected = gates * op.view(
            mean, batch, num_frames, 1, *((heads, -(-mean.shape[-1] // heads)) if heads > 1 else (mean.shape[-1],))
        )
        return self.output(op.view(selected, batch, num_queries, mean.shape[-1]))

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """Mirror `rotate` and `cos_sin` of ops/pom/rotary.py."""
        return rotate(x, cos_sin(positions, rotary_pairs(x.shape[-1], self.mixer.rope or 2)))

    def weights(self) -> list[Weight]:
        own = [] if self.coefficients is None else [self.coefficients]
        return [*own, *self.projection.weights(), *self.gate.weights(), *self.output.weights()]


def cos_sin(positions: Tensor, pairs: tuple[int, ...]) -> list[Table]:
    tables = []
    for num_pairs in pairs:
        angles = positions.tape.new((*positions.shape[:-1], num_pairs), FP32)
        tables.append((op.scaled(angles), op.scaled(angles)))
    return tables


def rotate(x: Tensor, tables: list[Table]) -> Tensor:
    parts = []
    for table in tables:
        cos, sin = (op.cast(numbers, x.itemsize) for numbers in table)
        first, second = op.part(x, cos.shape[-1]), op.part(x, cos.shape[-1])
        parts += [op.difference(first * cos, second * sin), second * cos + first * sin]
    return op.concatenate(parts)


class Attention:
    """Mixer of layers/attention.py; any mask is dense in queries and context."""

    def __init__(self, dim: int, mixer: AttentionMixer) -> None:
        self.mixer = mixer
        self.query, self.output = Linear(dim, dim), Linear(dim, dim)
        self.key_value = Linear(dim, 2 * dim, stacked=2)
        self.norms = [Weight((dim // mixer.heads,)) for _ in ("query", "key") if mixer.qk_norm]

    def __call__(
        self, x: Tensor, context: Tensor | None = None, mask: Mask = None, positions: Tensor | None = None
    ) -> Tensor:
        context = x if context is None else context
        num_heads = self.mixer.heads
        query = self.prepared(self.query(x), self.norms[:1], positions)
        key, value = op.chunk(self.key_value(context), 2)
        key = self.prepared(key, self.norms[1:], positions)
        if mask is None:
            return self.output(op.attention(query, key, value, num_heads))
        tape, (batch, num_queries), num_context = x.tape, x.shape[:2], context.shape[1]
        if isinstance(mask, int):  # block-causal: one mask for all samples
            readable = tape.new((1, 1, num_queries, num_context), op.BOOL)
            return self.output(op.attention(query, key, value, num_heads, readable))
        readable = tape.new((batch, 1, num_queries, num_context), op.BOOL)
        heads = op.attention(query, key, value, num_heads, readable)
        del readable
        return self.output(op.scaled(heads))  # rows that read nothing are set to 0

    def prepared(self, x: Tensor, norm: list[Weight], positions: Tensor | None) -> Tensor:
        """Normalise and turn the heads of a query or key (b n d)."""
        batch, num_tokens, dim = x.shape
        heads = op.view(x, batch, num_tokens, self.mixer.heads, dim // self.mixer.heads)
        for weight in norm:
            heads = op.rms_norm(heads, weight)
        if self.mixer.rope is not None and positions is not None:
            tables = cos_sin(positions, rotary_pairs(heads.shape[-1], self.mixer.rope))
            heads = rotate(heads, [(_for_heads(cos), _for_heads(sin)) for cos, sin in tables])
        return op.view(heads, batch, num_tokens, dim)

    def weights(self) -> list[Weight]:
        return [*self.query.weights(), *self.key_value.weights(), *self.output.weights(), *self.norms]


def _for_heads(table: Tensor) -> Tensor:
    """View a table (.. n P) as (.. n 1 P)."""
    return op.view(table, *table.shape[:-1], 1, table.shape[-1])


def build_mixer(dim: int, mixer: Mixer) -> PoM | Attention:
    """Mirror of the same name in models/block.py."""
    return Attention(dim, mixer) if isinstance(mixer, AttentionMixer) else PoM(dim, mixer)
