"""Entry of the operator: checks the operands once and chooses the implementation."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pomscale.ops.pom import naive, torch_path
from pomscale.ops.pom.masks import Mask, Segments, check_mask, check_step_mask
from pomscale.ops.pom.operands import Context, Queries, check_operands
from pomscale.ops.pom.split import TokenSplit
from pomscale.ops.pom.state import PomState

Implementation: TypeAlias = Literal["naive", "torch", "triton"]

# Read once: torch.compile cannot follow a variable that changes.
_FORCED = cast("Implementation | None", os.environ.get("POMSCALE_POM") or None)
_HAS_TRITON = find_spec("triton") is not None
_SPLIT = "it does not add the states of several processes"


class CannotServeError(ValueError):
    """The path of the operator that is asked for cannot serve the operands; its message says why."""


def polynomial_mixer(
    context: Context,
    queries: Queries,
    mask: Mask = None,
    *,
    split: TokenSplit | None = None,
    implementation: Implementation | None = None,
) -> Tensor:
    """Gate the mean of the context's features (equations in README.md).

    Args:
        context: n tokens that are read.
        queries: m tokens that read.
        mask: See `masks.Mask`; a query without context gets 0.
        split: Where the context's tokens lie if this process holds only some of them; mask is that of the local ones.
            For no mask and padding masks (b n), and for "causal" and BlockCausal, whose queries are the local tokens.
        implementation: The path; None = that of the variable POMSCALE_POM, or else the fastest that serves (`_chosen`).

    Returns:
        (b m W), or (b m d) with `queries.output`, in the dtype of the gates; sums run in fp32 (float64 for float64).

    Raises:
        ValueError: The operands do not fit together, or, as CannotServeError, the path that is asked for cannot serve
            them.
    """
    check_operands(context, queries)
    check_mask(mask, context.u.shape[0], queries.gate.shape[1], context.u.shape[1])
    if split is not None:
        _check_split(split, mask, context.u.shape[1])
    chosen = _chosen(implementation, context, queries, mask, split=split is not None)
    if chosen == "torch":
        return torch_path.polynomial_mixer(context, queries, mask, split)
    return _module(chosen).polynomial_mixer(context, queries, mask)


def _check_split(split: TokenSplit, mask: Mask, num_context: int) -> None:
    if isinstance(mask, Segments) or (isinstance(mask, Tensor) and mask.dim() == 3):
        raise ValueError('split: mask must be None, "causal", BlockCausal or bool (b n), got segments or (b m n)')
    if num_context != split.stop - split.start:
        raise ValueError(f"split: expected {split.stop - split.start} local tokens, got {num_context}")


def polynomial_mixer_step(
    context: Context,
    queries: Queries,
    past: PomState | None = None,
    mask: Mask = None,
    *,
    implementation: Implementation | None = None,
) -> tuple[Tensor, PomState]:
    """The operator on the next chunk of a sequence, carrying the state instead of the past tokens.

    Args:
        context: n >= 1 tokens of the chunk.
        queries: The same tokens.
        past: State of all earlier tokens; None = there are none.
        mask: None = the chunk is one block that reads the past and all of itself; bool (b n) = the same with padding;
            "causal" = each token reads the past and the chunk up to itself; BlockCausal = the chunk begins with a
            frame, and each token reads the past and the chunk up to the end of its frame.
        implementation: See `polynomial_mixer`.

    Returns:
        What `polynomial_mixer` returns for the chunk, and the state after it.

    Raises:
        ValueError: The operands do not fit together.
    """
    check_operands(context, queries)
    batch, num_tokens, _ = context.u.shape
    num_queries, width = queries.gate.shape[1], context.num_features
    check_mask(mask, batch, num_queries, num_tokens)
    if num_queries != num_tokens or num_tokens == 0:
        raise ValueError(f"step: expected u and gate of the same n >= 1 tokens, got {num_tokens} and {num_queries}")
    check_step_mask(mask)
    if past is None:
        past = PomState.zeros(batch, width, context.u.dtype, context.u.device)
    elif not isinstance(past, PomState):
        raise ValueError(f"step: expected a PomState, got {type(past).__name__}")
    else:
        past.check(batch, width, context.form)
    chosen = _chosen(implementation, context, queries, mask, split=False)
    y, state = _module(chosen).polynomial_mixer_step(context, queries, past, mask)
    return y, replace(state, form=context.form)


def is_path_forced() -> bool:
    """Return whether POMSCALE_POM says which path of the operator serves."""
    return _FORCED is not None


def is_transformed() -> bool:
    """Return whether torch.func or forward-mode derivatives are at work.

    Operators of torch.library have no rules for them, and drop the tangents without a word.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _chosen(
    implementation: Implementation | None, context: Context, queries: Queries, mask: Mask, *, split: bool
) -> Implementation:
    """Return the path that serves: what is asked for, else triton for CUDA tensors where it can, else torch.

    split: whether other processes hold some of the tokens.
    Raises CannotServeError, with the reason, where the path that is asked for cannot serve.
    """
    asked = implementation or _FORCED
    if asked is None:
        on_gpu = context.u.is_cuda and _why_not_triton(context, queries, mask, split) is None
        return "triton" if on_gpu else "torch"
    if asked == "naive":
        reason = _SPLIT if split else None
    elif asked == "triton":
        reason = _why_not_triton(context, queries, mask, split)
    elif asked == "torch":
        reason = None
    else:
        raise ValueError(f"POMSCALE_POM: expected one of {', '.join(get_args(Implementation))}, got {asked!r}")
    if reason is not None:
        raise CannotServeError(f"the {asked} path of the Polynomial Mixer cannot serve: {reason}")
    return asked


def _why_not_triton(context: Context, queries: Queries, mask: Mask, split: bool) -> str | None:
    """Return why the Triton path cannot serve, or None if it can."""
    if split:
        return _SPLIT
    if is_transformed():
        return "it has no rules for torch.func and forward-mode derivatives"
    if isinstance(mask, Tensor) and mask.dim() == 3:
        return "it has no masks (b m n)"
    for name, x in (("u", context.u), ("gate", queries.gate)):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it computes in fp32, and {name} is {x.dtype}"
        # Interpreted, the kernels run on CPU tensors, very slowly.
        if not x.is_cuda and not (x.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"):
            return f"it needs tensors on CUDA, and {name} is on {x.device}"
    return None if _HAS_TRITON else "the package triton is not installed"


def _module(path: Implementation) -> Any:
    if path == "triton":
        from pomscale.ops.pom import triton_path  # noqa: PLC0415  triton is there only where CUDA or its tests are

        return triton_path
    return naive if path == "naive" else torch_path
