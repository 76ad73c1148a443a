#!/usr/bin/env bash
# torch 2.13.0: a custom operator gives no gradient to tensors in a list Sequence[Optional[Tensor]] that holds a None.
#
# The schema is Tensor?[], which custom_op and register_autograd accept. [a, b] gets gradients; in [a, None] a gets none: the
# list counts as one thing that is no tensor (needs_input_grad is False for it), and the result has no grad_fn unless another
# argument requires gradients. Nothing warns. torch/_library/autograd.py takes lists apart by not_list_of_tensor, though
# not_list_of_optional_tensor is beside it. Lists without None, or arguments Optional[Tensor] one by one, work.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import sys
import warnings
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor


@torch.library.custom_op("findings::total", mutates_args=())
def total(factor: Tensor, terms: Sequence[Optional[Tensor]]) -> Tensor:
    return factor * sum(term for term in terms if term is not None)


def keep(ctx, inputs, output):
    ctx.factor, ctx.terms = inputs


def backward(ctx, gradient):
    of_factor = gradient * sum(term for term in ctx.terms if term is not None)
    if not ctx.needs_input_grad[1]:
        return of_factor, None
    return of_factor, [None if term is None else gradient * ctx.factor for term in ctx.terms]


total.register_autograd(backward, setup_context=keep)


def gradients(other, factor_is_trained):
    """Gradients of the factor 2 and of a term 5, beside which there is `other`; None where none has come."""
    factor, term = torch.tensor(2.0, requires_grad=factor_is_trained), torch.tensor(5.0, requires_grad=True)
    result = total(factor, [term, other])
    if result.requires_grad:
        result.backward()
    return [tensor.grad if tensor.grad is None else tensor.grad.item() for tensor in (factor, term)]


cases = [(torch.tensor(1.0), True), (None, True), (torch.tensor(1.0), False), (None, False)]
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    found = [gradients(*case) for case in cases]
print(f"torch {torch.__version__}: {torch.ops.findings.total.default._schema}; factor 2, terms [5, other]")
for (other, is_trained), (of_factor, of_term) in zip(cases, found):
    print(f"  other {other!s:10} factor requires grad: {is_trained!s:5}  gradients: factor {of_factor}, term {of_term}")
print(f"  warnings: {len(seen)}")
as_found = found == [[6.0, 2.0], [5.0, None], [None, 2.0], [None, None]] and not seen
print("as found" if as_found else "CHANGED: a list with None no longer loses its gradients in silence")
sys.exit(0 if as_found else 1)
PYTHON
