"""Who is measured on a device: our layer by each path, and its named rivals."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend

from pomscale.benchmarks.operators.cases import Case
from pomscale.benchmarks.operators.entries import (
    AttentionLayer,
    CannotServeError,
    CompiledPlain,
    Entry,
    Gemms,
    Layered,
    Lean,
    OfficialLayer,
    Ours,
)
from pomscale.benchmarks.operators.official import Official
from pomscale.layers import PoM

FLOOR, OURS, ATTENTION = "bare GEMMs", "ours", "attention"
LEAN, LAYERED = "ours, lean", "ours, layered"  # recomputing; operator between linear maps
OFFICIAL, OFFICIAL_COMPILED, PLAIN = "official, eager", "official, compiled", "plain, compiled"
PATHS = ("naive", "torch", "triton")
_PATH_VARIABLE = "POMSCALE_POM"
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
        path: Implementation of our operator that is forced, or None for the layer's own choice.
    """

    name: str
    make: Callable[[Case, torch.device], Entry]
    most_tokens: tuple[float, float] = (math.inf, math.inf)
    path: str | None = None

    def build(self, case: Case, device: torch.device) -> Entry:
        """Build the layer of a case with the same random weights at each call. Raises CannotServeError."""
        most = self.most_tokens[case.is_dense]
        if case.num_tokens > most:
            raise CannotServeError(f"it needs n x n numbers, and is measured up to {most:.0f} tokens")
        torch.manual_seed(0)
        return self.make(case, device).prepared()

    @contextmanager
    def forced(self) -> Iterator[None]:
        """Force the path while the block lasts."""
        with _environment(_PATH_VARIABLE, self.path):
            yield


def contenders(official: Official, device: torch.device, *, with_compiled: bool = True) -> list[Contender]:
    """Return all that can be measured on the device, the floor first and ours second.

    Without `with_compiled`, those that torch.compile makes are left out.
    """
    everywhere = (math.inf, math.inf)
    dense = (math.inf, _MOST_DENSE)
    found = [Contender(FLOOR, Gemms), Contender(OURS, Ours)]
    if Lean.exists():
        found.append(Contender(LEAN, Lean))
    found.append(Contender(LAYERED, Layered))
    if paths_can_be_forced():
        limits = {"naive": (_MOST_NAIVE, _MOST_NAIVE)}
        found += [Contender(f"ours, {path}", Ours, limits.get(path, everywhere), path) for path in PATHS]
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
        limits_of_one = (_MOST_DENSE, _MOST_DENSE) if name == "math" else dense
        found.append(Contender(f"{ATTENTION}, {name}", partial(AttentionLayer, backend=backend), limits_of_one))
    return found


def paths_can_be_forced() -> bool:
    """Return whether the operator obeys POMSCALE_POM: one that does refuses the name of no path."""
    with _environment(_PATH_VARIABLE, "no-such-path"):
        try:
            PoM(8)(torch.zeros(1, 1, 8))
        except ValueError:
            return True
    return False


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set a variable while the block lasts; None leaves it as it is."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
