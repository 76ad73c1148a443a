"""Forward pass of the whole mixer, chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from pomscale.ops.pom.whole.layout import Chunk, Run, chunks, largest_chunk, num_chunks, parts
from pomscale.ops.pom.whole.operands import Call, linear_


class Activations:
    """Pre-activations u and gate of the tokens, kept whole or chunk by chunk in buffers that are used again."""

    def __init__(self, call: Call, keep: bool, kept: tuple[Tensor, Tensor] | None = None) -> None:
        self._call, self.keep = call, keep
        x, weights = call.x, call.weights
        widths = weights.projection.shape[0], weights.gate.shape[0]
        num_rows = call.context.shape[0], x.shape[0]
        if kept is not None:
            self.u, self.gate = kept
        elif keep:
            # They have room for all tokens, so one product makes each: a product per chunk packs the weights anew. Rows
            # of padding, which may be NaN, are not read.
            self.u, self.gate = (x.new_empty(*shape) for shape in zip(num_rows, widths, strict=True))
            linear_(call.context, weights.projection, weights.projection_bias, self.u)
            linear_(x, weights.gate, weights.gate_bias, self.gate)
        elif call.layout.order == "causal":  # both are needed at once
            self.u, self.gate = (
                x.new_empty(largest_chunk(rows), width) for rows, width in zip(num_rows, widths, strict=True)
            )
        else:
            buffer = x.new_empty(largest_chunk(*num_rows) * max(widths))
            self.u, self.gate = (
                buffer[: largest_chunk(rows) * width].view(-1, width)
                for rows, width in zip(num_rows, widths, strict=True)
            )

    def _part(self, whole: Tensor, chunk: Chunk) -> Tensor:
        return whole[chunk.start : chunk.stop] if self.keep else whole[: chunk.stop - chunk.start]

    def of_context(self, chunk: Chunk, rows: Tensor) -> Tensor:
        """Return u of a chunk of context, whose tokens are `rows`."""
        out = self._part(self.u, chunk)
        weights = self._call.weights
        return out if self.keep else linear_(rows, weights.projection, weights.projection_bias, out)

    def of_queries(self, chunk: Chunk) -> Tensor:
        """Return gate of a chunk of queries."""
        out = self._part(self.gate, chunk)
        weights = self._call.weights
        rows = self._call.x[chunk.start : chunk.stop]
        return out if self.keep else linear_(rows, weights.gate, weights.gate_bias, out)


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mix -> y (b m, d_out), u and gate (empty unless kept), and the states that the backward pass starts from.

    States are the means (states, W), or for causal order the running sum before each chunk (chunks, W).
    """
    activations = Activations(call, keep)
    y = call.x.new_empty(call.x.shape[0], call.weights.output.shape[0])
    states = _causal(call, activations, y) if call.layout.order == "causal" else _by_states(call, activations, y)
    if keep:
        return y, activations.u, activations.gate, states
    return y, y.new_empty(0), y.new_empty(0), states


def _by_states(call: Call, activations: Activations, y: Tensor) -> Tensor:
    means = _means(call, activations)
    if call.folds:
        _read_folded(call, activations, means, y)
        return means
    weights = call.weights
    all_chunks = chunks(call.layout.query_runs(), call.x.shape[0])
    # Gates of heads have another width than what they select.
    needs_buffer = activations.keep or call.form.heads > 1
    buffer = call.x.new_empty(largest_chunk(call.x.shape[0]), call.num_features) if needs_buffer else None
    for chunk in all_chunks:
        gate = activations.of_queries(chunk)
        selected = gate if buffer is None else buffer[: chunk.stop - chunk.start]
        for run, part in parts(chunk):
            mean = means[run.state : run.state + 1]
            call.kernels.select(gate[part], call.query_rows(run), mean, selected[part])
        linear_(selected, weights.output, weights.output_bias, y[chunk.start : chunk.stop])
    return means


def _means(call: Call, activations: Activations) -> Tensor:
    layout = call.layout
    totals = torch.zeros(layout.num_states, call.num_features, dtype=call.sums, device=call.x.device)
    for chunk in chunks(layout.context_runs(), call.context.shape[0]):
        u = activations.of_context(chunk, call.context_chunk(chunk.start, chunk.stop))
        for run, part in parts(chunk):
            call.kernels.add_features(u[part], call.context_rows(run), totals[run.state])
    takes_part = None if call.takes_part is None else call.takes_part.view(layout.batch, -1)
    return layout.running_(totals).div_(layout.counts(takes_part, totals.device)[:, None])


def folded_map(call: Call, means: Tensor) -> Tensor:
    """Return Wo_h H_h of each head and state, (states, S, d_out), in the dtype of the tokens."""
    heads = call.form.heads
    of_heads = means.to(call.x.dtype).unflatten(1, (heads, -1)).transpose(0, 1)  # (S, states, head width)
    outputs = call.weights.output.unflatten(1, (heads, -1)).permute(1, 2, 0)  # (S, head width, d_out)
    return torch.bmm(of_heads, outputs).transpose(0, 1).contiguous()


def _read_folded(call: Call, activations: Activations, means: Tensor, y: Tensor) -> None:
    folded, bias = folded_map(call, means), call.weights.output_bias
    for chunk in chunks(call.layout.query_runs(), call.x.shape[0]):
        rows = call.query_rows(chunk)
        gates = call.torch_kernels.gates(activations.of_queries(chunk), rows, call.num_features).to(y.dtype)
        for run, part in parts(chunk):
            linear_(gates[part], folded[run.state].t(), bias, y[run.start : run.stop])


def _causal(call: Call, activations: Activations, y: Tensor) -> Tensor:
    rows, width = call.x.shape[0], call.num_features
    before = torch.zeros(num_chunks(rows), width, dtype=call.sums, device=y.device)
    carry = before.new_zeros(width)
    running = before.new_empty(largest_chunk(rows), width)
    # Means are replaced by what is selected of them, unless that is rounded.
    selected = running if running.dtype == y.dtype else torch.empty_like(running, dtype=y.dtype)
    for number, chunk in enumerate(chunks(call.layout.query_runs(), rows)):
        before[number] = carry
        u = activations.of_context(chunk, call.context_chunk(chunk.start, chunk.stop))
        gate = activations.of_queries(chunk)
        for run, part in parts(chunk):
            running_means(call, u[part], run, carry, running[part])
            call.kernels.select(gate[part], call.query_rows(run), running[part], selected[part])
        length = chunk.stop - chunk.start
        linear_(selected[:length], call.weights.output, call.weights.output_bias, y[chunk.start : chunk.stop])
    return before


def running_means(call: Call, u: Tensor, run: Run, carry: Tensor, out: Tensor) -> None:
    """Write the means that the rows of a causal run read to `out`, and the sum up to its end to `carry`."""
    if run.offset == 0:
        carry.zero_()
    call.kernels.features(u, call.context_rows(run), out)
    call.kernels.running_means(out, carry, run.offset)
