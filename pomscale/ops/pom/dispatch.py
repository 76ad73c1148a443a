"""Entry of the operator: checks the operands once and chooses the implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

from torch import Tensor

from pomscale.ops.pom import naive, torch_path
from pomscale.ops.pom.masks import Mask, Segments, check_mask, check_step_mask
from pomscale.ops.pom.operands import Context, Queries, check_operands
from pomscale.ops.pom.split import TokenSplit
from pomscale.ops.pom.state import PomState

Implementation: TypeAlias = Literal["torch", "naive"]


def polynomial_mixer(
    context: Context,
    queries: Queries,
    mask: Mask = None,
    *,
    split: TokenSplit | None = None,
    implementation: Implementation = "torch",
) -> Tensor:
    """Gate the mean of the context's features (equations in README.md).

    Args:
        context: n tokens that are read.
        queries: m tokens that read.
        mask: See `masks.Mask`; a query without context gets 0.
        split: Where the context's tokens lie if this process holds only some of them; mask is that of the local ones.
            For no mask and padding masks (b n), and for "causal" and BlockCausal, whose queries are the local tokens.
        implementation: The path; tests choose the oracle.

    Returns:
        (b m W), or (b m d) with `queries.output`, in the dtype of the gates; sums run in fp32 (float64 for float64).

    Raises:
        ValueError: The operands do not fit together.
    """
    check_operands(context, queries)
    check_mask(mask, context.u.shape[0], queries.gate.shape[1], context.u.shape[1])
    if split is not None:
        _check_split(split, mask, context.u.shape[1])
    if implementation == "naive":
        assert split is None, "the oracle holds all tokens"
        return naive.polynomial_mixer(context, queries, mask)
    return torch_path.polynomial_mixer(context, queries, mask, split)


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
    implementation: Implementation = "torch",
) -> tuple[Tensor, PomState]:
    """The operator on the next chunk of a sequence, carrying the state instead of the past tokens.

    Args:
        context: n >= 1 tokens of the chunk.
        queries: The same tokens.
        past: State of all earlier tokens; None = there are none.
        mask: None = the chunk is one block that reads the past and all of itself; bool (b n) = the same with padding;
            "causal" = each token reads the past and the chunk up to itself; BlockCausal = the chunk begins with a
            frame, and each token reads the past and the chunk up to the end of its frame.
        implementation: The path; tests choose the oracle.

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
    path = naive if implementation == "naive" else torch_path
    y, state = path.polynomial_mixer_step(context, queries, past, mask)
    return y, replace(state, form=context.form)
