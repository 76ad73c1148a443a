"""Entry of the operator: checks the operands once and chooses the implementation."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from pomscale.ops.pom import naive, torch_path
from pomscale.ops.pom.masks import BlockCausal, Mask, check_mask
from pomscale.ops.pom.state import PomState, StateReduce

Implementation: TypeAlias = Literal["torch", "naive"]


def polynomial_mixer(
    u: Tensor,
    gate: Tensor,
    degree: int,
    mask: Mask = None,
    *,
    state_reduce: StateReduce | None = None,
    implementation: Implementation = "torch",
) -> Tensor:
    """Gate the mean of the context's monomials: sigmoid(gate) o H (PoM v1, arXiv 2411.12663, equations in README.md).

    u: (b n kD) floating, pre-activations of the context: W_1 x .. W_k x side by side.
    gate: (b m kD), pre-sigmoid logits of the queries. mask: see `masks.Mask`; a query without context gets 0.
    state_reduce: merges the state of the local tokens with that of others before the mean; only for no mask and for
        padding masks (b n), whose queries share one state.
    Returns (b m kD) in the dtype of `gate`; sums run in fp32 (float64 for float64 inputs).
    Raises ValueError for operands that do not fit together.
    """
    _check_operands(u, gate, degree)
    check_mask(mask, u.shape[0], gate.shape[1], u.shape[1])
    one_state = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
    if state_reduce is not None and not one_state:
        raise ValueError("state_reduce: only no mask and padding masks (b n) have one state per sample")
    if implementation == "naive":
        assert state_reduce is None, "the oracle holds no partial state"
        return naive.polynomial_mixer(u, gate, degree, mask)
    return torch_path.polynomial_mixer(u, gate, degree, mask, state_reduce)


def polynomial_mixer_step(
    u: Tensor,
    gate: Tensor,
    degree: int,
    past: PomState | None = None,
    mask: Mask = None,
    *,
    implementation: Implementation = "torch",
) -> tuple[Tensor, PomState]:
    """The operator on the next chunk of a sequence, carrying the state instead of the past tokens.

    u, gate: (b n kD) of the chunk, n >= 1. past: state of all earlier tokens; None = there are none.
    mask: None = the chunk is one block that reads the past and all of itself; bool (b n) = the same with padding;
        "causal" = each token reads the past and the chunk up to itself.
    Returns y (b n kD) and the state after the chunk. Raises ValueError for operands that do not fit together.
    """
    _check_operands(u, gate, degree)
    batch, num_tokens, width = u.shape
    check_mask(mask, batch, gate.shape[1], num_tokens)
    if gate.shape[1] != num_tokens or num_tokens == 0:
        raise ValueError(f"step: expected u and gate of the same n >= 1 tokens, got {num_tokens} and {gate.shape[1]}")
    if isinstance(mask, BlockCausal) or (isinstance(mask, Tensor) and mask.dim() == 3):
        raise ValueError('step: mask must be None, "causal" or bool (b n)')
    if past is None:
        past = PomState.zeros(batch, width, u.dtype, u.device)
    elif past.sum.shape != (batch, width):
        raise ValueError(f"step: expected a state of shape {(batch, width)}, got {tuple(past.sum.shape)}")
    if implementation == "naive":
        return naive.polynomial_mixer_step(u, gate, degree, past, mask)
    return torch_path.polynomial_mixer_step(u, gate, degree, past, mask)


def _check_operands(u: Tensor, gate: Tensor, degree: int) -> None:
    if degree < 1:
        raise ValueError(f"degree: must be at least 1, got {degree}")
    if u.dim() != 3 or gate.dim() != 3 or u.shape[0] != gate.shape[0] or u.shape[2] != gate.shape[2]:
        raise ValueError(f"expected u (b n kD) and gate (b m kD), got {tuple(u.shape)} and {tuple(gate.shape)}")
    if u.shape[2] % degree:
        raise ValueError(f"degree: {degree} does not divide the {u.shape[2]} channels")
