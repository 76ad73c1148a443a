"""Who is measured on a device: our layer, our operator by each path between linear maps, and named rivals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch.nn.attention import SDPBackend

from pomscale.benchmarks.operators.cases import Case
from pomscale.benchmarks.operators.entries import (
    AttentionLayer,
    CompiledPlain,
    Entry,
    Gemms,
    Layered,
    Lean,
    OfficialLayer,
    Ours,
)
from pomscale.benchmarks.operators.official import Official
from pomscale.ops.pom.dispatch import CannotServeError, Implementation

FLOOR, OURS, ATTENTION = "bare GEMMs", "ours", "attention"
LEAN, LAYERED = "ours, lean", "layered, torch"  # recomputing; the operator's torch path between linear maps
OFFICIAL, OFFICIAL_COMPILED, PLAIN = "official, eager", "official, compiled", "plain, compiled"
# Tokens above which a contender that is dense in n x n is left out: the oracle, and others under masks.
_MOST_NAIVE, _MOST_DENSE = 512, 8192
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Contender:
    """A layer that is measured.

    Attributes:
        name: Name in tables and pictures.
        make: Makes the layer of a case on a device; raises CannotServeError where it has no form for it.
        most_tokens: Tokens above which it is left out in a case that is not dense, and in one that is.
        in_chunks: Whether it may take tokens in chunks, so that a short sequence does not check all of it.
    """

    name: str
    make: Callable[[Case, torch.device], Entry]
    most_tokens: tuple[float, float] = (math.inf, math.inf)
    in_chunks: bool = False

    def build(self, case: Case, device: torch.device) -> Entry:
        """Build the layer of a case with the same random weights at each call. Raises CannotServeError."""
        most = self.most_tokens[case.is_dense]
        if case.num_tokens > most:
            raise CannotServeError(f"it needs n x n numbers, and is measured up to {most:.0f} tokens")
        torch.manual_seed(0)
        return self.make(case, device).prepared()


def contenders(official: Official, device: torch.device, *, with_compiled: bool = True) -> list[Contender]:
    """Return all that can be measured on the device, the floor first and ours second.

    Without `with_compiled`, those that torch.compile makes are left out.
    """
    everywhere = (math.inf, math.inf)
    dense = (math.inf, _MOST_DENSE)
    found = [
        Contender(FLOOR, Gemms),
        Contender(OURS, Ours, in_chunks=True),
        Contender(LEAN, Lean, in_chunks=True),
    ]
    for path in get_args(Implementation):
        is_naive = path == "naive"
        limits = (_MOST_NAIVE, _MOST_NAIVE) if is_naive else everywhere
        found.append(Contender(f"layered, {path}", partial(Layered, path=path), limits, in_chunks=not is_naive))
    if official.hom is not None or official.pom is not None:
        found.append(Contender(OFFICIAL, partial(OfficialLayer, official=official), dense))
        if with_compiled:
            make = partial(OfficialLayer, official=official, compiled=True)
            found.append(Contender(OFFICIAL_COMPILED, make, dense))
    if with_compiled:
        found.append(Contender(PLAIN, CompiledPlain, dense))
    if device.type != "cuda":
        return [*found, Contender(ATTENTION, AttentionLayer, dense)]
    for name, backend in _BACKENDS.items():
        limits = (_MOST_DENSE, _MOST_DENSE) if name == "math" else dense
        found.append(Contender(f"{ATTENTION}, {name}", partial(AttentionLayer, backend=backend), limits))
    return found
