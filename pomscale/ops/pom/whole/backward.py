"""Backward pass of the whole mixer, chunk by chunk; README.md of the package above has the equations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pomscale.ops.pom.whole.forward import Activations, folded_map, running_means
from pomscale.ops.pom.whole.layout import Chunk, chunks, largest_chunk, parts
from pomscale.ops.pom.whole.operands import Call, Gradient


class Backward:
    """Gradients of one call. needed: which of x, context and the weights' tensors, in this order, need one."""

    def __init__(self, call: Call, dy: Tensor, kept: tuple[Tensor, Tensor] | None, needed: Sequence[bool]) -> None:
        self.call, self.dy = call, dy
        self.activations = Activations(call, kept is not None, kept)
        weights, sums = call.weights, call.sums
        self.projection = Gradient(weights.projection, weights.projection_bias, needed[2:4], sums)
        self.gate = Gradient(weights.gate, weights.gate_bias, needed[4:6], sums)
        self.output = Gradient(weights.output, weights.output_bias, needed[6:8], sums)
        coefficients = weights.coefficients
        self.coefficients = None
        if needed[8] and coefficients is not None:
            self.coefficients = torch.zeros_like(coefficients, dtype=sums)
        self.is_self = call.context is call.x
        self.dx = torch.empty_like(call.x) if needed[0] else None
        self.dcontext = torch.empty_like(call.context) if needed[1] and not self.is_self else None

    def results(self) -> list[Tensor | None]:
        """Return the gradients of x, context and the weights' tensors, in this order; None where none is needed."""
        coefficients, found = self.coefficients, self.call.weights.coefficients
        return [
            self.dx,
            self.dcontext,
            *self.projection.results(),
            *self.gate.results(),
            *self.output.results(),
            None if coefficients is None or found is None else coefficients.to(found.dtype),
        ]

    def add_queries(self, chunk: Chunk, dgate: Tensor) -> None:
        """Pass the gradient of the logits of a chunk to the gate's map and to x."""
        call, rows = self.call, slice(chunk.start, chunk.stop)
        self.gate.add(dgate, call.x[rows])
        if self.dx is not None:
            torch.mm(dgate, call.weights.gate, out=self.dx[rows])

    def add_context(self, chunk: Chunk, tokens: Tensor, du: Tensor) -> None:
        """Pass the gradient of u of a chunk, whose tokens are `tokens`, to the projection and to the context."""
        weight, rows = self.call.weights.projection, slice(chunk.start, chunk.stop)
        self.projection.add(du, tokens)
        if self.is_self and self.dx is not None:
            self.dx[rows].addmm_(du, weight)
        elif self.dcontext is not None:
            torch.mm(du, weight, out=self.dcontext[rows])


def backward(
    call: Call, dy: Tensor, kept: tuple[Tensor, Tensor] | None, states: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of x, context and the weights' tensors, in this order, given dy (b m, d_out).

    kept: u and gate, or None to recompute them. states: those of `forward`. In a self mixer that of x holds both.
    """
    run = Backward(call, dy, kept, needed)
    if call.layout.order == "causal":
        _causal(run, states)
    else:
        dmeans = _folded_queries(run, states) if call.folds else _queries(run, states)
        _context(run, dmeans)
    return run.results()


def _queries(run: Backward, means: Tensor) -> Tensor:
    """Run over the queries -> gradient of the means (states, W)."""
    call, dmeans = run.call, torch.zeros_like(means)
    longest = largest_chunk(call.x.shape[0])
    gradients = run.dy.new_empty(longest, call.num_features)
    heads = call.form.heads
    buffer = torch.empty_like(gradients) if run.activations.keep or heads > 1 else None
    for chunk in chunks(call.layout.query_runs(), call.x.shape[0]):
        length, rows = chunk.stop - chunk.start, run.dy[chunk.start : chunk.stop]
        gate = run.activations.of_queries(chunk)
        selected = gate if buffer is None else buffer[:length]
        dselected = torch.mm(rows, call.weights.output, out=gradients[:length])
        # The gates of heads have another width than what they select.
        dgate = dselected if heads == 1 else torch.empty_like(gate)
        for part_of, part in parts(chunk):
            state = part_of.state
            call.kernels.select_backward(
                gate[part],
                call.query_rows(part_of),
                means[state : state + 1],
                (dselected[part], selected[part], dgate[part]),
                dmeans[state],
            )
        run.output.add(rows, selected)
        run.add_queries(chunk, dgate)
    return dmeans


def _folded_queries(run: Backward, means: Tensor) -> Tensor:
    """Run over queries that read states through the output map -> gradient of the means (states, W)."""
    call, heads = run.call, run.call.form.heads
    folded = folded_map(call, means)  # (states, S, d_out)
    dfolded = torch.zeros_like(folded, dtype=call.sums)
    for chunk in chunks(call.layout.query_runs(), call.x.shape[0]):
        gate, rows = run.activations.of_queries(chunk), call.query_rows(chunk)
        gates = call.torch_kernels.gates(gate, rows, call.num_features).to(run.dy.dtype)
        dgates = torch.empty_like(gate, dtype=call.sums)
        for part_of, part in parts(chunk):
            dy, state = run.dy[part_of.start : part_of.stop], part_of.state
            dfolded[state] += gates[part].t() @ dy
            dgates[part] = dy @ folded[state].t()
        dgate = call.torch_kernels.gates_backward(gate, rows, dgates, call.num_features).to(gate.dtype)
        run.add_queries(chunk, dgate)
    output = call.weights.output.to(call.sums).unflatten(1, (heads, -1)).permute(1, 0, 2)  # (S, d_out, head width)
    of_heads = dfolded.transpose(0, 1)  # (S, states, d_out)
    if run.output.bias is not None:
        run.output.bias += run.dy.sum(0, dtype=call.sums)
    if run.output.weight is not None:
        mean = means.unflatten(1, (heads, -1)).transpose(0, 1)  # (S, states, head width)
        run.output.weight += torch.bmm(of_heads.transpose(1, 2), mean).transpose(0, 1).flatten(1)
    # Heads of one channel are flattened without a copy, and the kernels read plain rows.
    return torch.bmm(of_heads, output).transpose(0, 1).flatten(1).contiguous()


def _context(run: Backward, dmeans: Tensor) -> None:
    """Run over the context, given the gradient of the means (states, W), which is overwritten."""
    call, layout = run.call, run.call.layout
    takes_part = None if call.takes_part is None else call.takes_part.view(layout.batch, -1)
    dsums = layout.running_(dmeans.div_(layout.counts(takes_part, dmeans.device)[:, None]), backward=True)
    buffer = None
    if run.activations.keep:
        buffer = run.dy.new_empty(largest_chunk(call.context.shape[0]), call.weights.projection.shape[0])
    covered = chunks(layout.context_runs(), call.context.shape[0])
    for chunk in covered:
        tokens = call.context_chunk(chunk.start, chunk.stop)
        u = run.activations.of_context(chunk, tokens)
        du = u if buffer is None else buffer[: chunk.stop - chunk.start]
        for part_of, part in parts(chunk):
            dh = dsums[part_of.state : part_of.state + 1]
            call.kernels.features_backward(u[part], call.context_rows(part_of), dh, du[part], run.coefficients)
        run.add_context(chunk, tokens, du)


def _causal(run: Backward, before: Tensor) -> None:
    """Run over all tokens from the last chunk to the first; `before` is the running sum before each."""
    call, dy = run.call, run.dy
    longest, width = largest_chunk(call.x.shape[0]), call.num_features
    means, carry = before.new_empty(longest, width), before.new_zeros(width)
    gradients, selected = dy.new_empty(longest, width), dy.new_empty(longest, width)
    all_chunks = chunks(call.layout.query_runs(), call.x.shape[0])
    for number, chunk in reversed(list(enumerate(all_chunks))):
        length, tokens = chunk.stop - chunk.start, call.context_chunk(chunk.start, chunk.stop)
        u, gate = run.activations.of_context(chunk, tokens), run.activations.of_queries(chunk)
        rows, sums = dy[chunk.start : chunk.stop], before[number].clone()
        for part_of, part in parts(chunk):
            running_means(call, u[part], part_of, sums, means[part])
        dselected = torch.mm(rows, call.weights.output, out=gradients[:length])
        # The gates of heads have another width than what they select.
        dgate = dselected if call.form.heads == 1 else torch.empty_like(gate)
        for part_of, part in parts(chunk):
            out = dselected[part], selected[part], dgate[part]
            call.kernels.select_backward(gate[part], call.query_rows(part_of), means[part], out, means[part])
        run.output.add(rows, selected[:length])
        run.add_queries(chunk, dgate)
        du = selected[:length]
        for part_of, part in reversed(parts(chunk)):
            if part_of.is_last:
                carry.zero_()
            call.kernels.running_means_backward(means[part], carry, part_of.offset)
            call.kernels.features_backward(u[part], call.context_rows(part_of), means[part], du[part], run.coefficients)
        run.add_context(chunk, tokens, du)
