#!/usr/bin/env bash
# deepspeed 0.19.8 with torch 2.13.0: ZeRO-3's replacement of F.linear, under selective activation checkpointing that keeps
# matrix products, adds the bias twice when the block runs again. Nothing warns or fails, and gradients are those of another
# network.
#
# deepspeed.zero.Init, and any engine of stage 3, put zero3_linear_wrap in the place of torch.nn.functional.linear for the
# whole process. For an input of three axes its forward pass is matmul(input, weight.t()), and then `output += bias` in
# place. Selective checkpointing (create_selective_checkpoint_contexts) keeps the output of aten.mm; the sum is written
# into the memory of what was kept. torch's own check of mutated tensors compares version counters, and matmul returns an
# _unsafe_view of mm's output, which has a counter of its own. When the block runs again, mm gives the kept tensor, which
# has the bias already, and the bias is added to it again. With torch's own F.linear the same code is right, and so is
# DeepSpeed's with full checkpointing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q numpy==2.4.6 setuptools==80.9.0
DS_ACCELERATOR=cpu "$work/venv/bin/pip" install -q --no-build-isolation deepspeed==0.19.8
cd "$work"
DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 venv/bin/python - <<'PYTHON' 2>/dev/null
import sys
import warnings

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

torch.manual_seed(0)
x, target = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
weight, bias = torch.randn(5, 4), torch.ones(5)


def policy(context, operator, *args, **kwargs):
    is_product = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


def gradients(linear, how):
    """Gradient of the weight and of the bias of sum(tanh(linear(x)) * target)."""
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    block = lambda inputs: torch.tanh(linear(inputs.exp(), w, b)).exp()
    inputs = x.clone().requires_grad_()
    if how == "none":
        y = block(inputs)
    elif how == "full":
        y = checkpoint(block, inputs, use_reentrant=False)
    else:
        y = checkpoint(
            block, inputs, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )
    (y * target).sum().backward()
    return torch.cat([w.grad.flatten(), b.grad])


plain = F.linear
expected = gradients(plain, "none")
errors = {}
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for name, linear in (("torch's F.linear", plain), ("DeepSpeed's", zero3_linear_wrap)):
        for how in ("none", "full", "selective"):
            errors[name, how] = ((gradients(linear, how) - expected).abs().max() / expected.abs().max()).item()
print(f"torch {torch.__version__}, deepspeed {deepspeed.__version__}: largest error of the gradients, relative")
for (name, how), error in errors.items():
    print(f"  {name:18} checkpointing {how:10} {error:.1e}")
print(f"  warnings: {len([w for w in seen if 'mutat' in str(w.message)])}")
wrong = errors.pop(("DeepSpeed's", "selective"))
as_found = wrong > 0.01 and max(errors.values()) < 1e-5
print("as found" if as_found else "CHANGED: selective checkpointing with DeepSpeed's linear map has the right gradients")
sys.exit(0 if as_found else 1)
PYTHON
