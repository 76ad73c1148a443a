"""Ledger of the bytes that are alive, by their use, and of the moment when they were most."""

from __future__ import annotations

from typing import Literal, TypeAlias

Part: TypeAlias = Literal["parameters", "gradients", "optimizer", "ema", "gathered", "reduction", "activations"]


class Ledger:
    """Counts of `live` and `peak` bytes; `at_peak` has the bytes by part at the peak, `moment` is its name."""

    def __init__(self) -> None:
        self.live = 0
        self.by_part: dict[Part, int] = {}
        self.peak = 0
        self.at_peak: dict[Part, int] = {}
        self.moment = ""
        self.now = "start"
        """Name of the present moment, set by the code that runs the step."""

    def add(self, part: Part, num_bytes: int) -> None:
        self.live += num_bytes
        self.by_part[part] = self.by_part.get(part, 0) + num_bytes
        if self.live > self.peak:
            self.peak = self.live
            self.at_peak = self.by_part.copy()
            self.moment = self.now

    def remove(self, part: Part, num_bytes: int) -> None:
        self.live -= num_bytes
        self.by_part[part] -= num_bytes


class Storage:
    """Bytes that are alive for as long as something refers to this object: CPython counts references, as torch does."""

    __slots__ = ("ledger", "num_bytes", "part")

    def __init__(self, ledger: Ledger, part: Part, num_bytes: int) -> None:
        self.ledger, self.part, self.num_bytes = ledger, part, num_bytes
        ledger.add(part, num_bytes)

    def __del__(self) -> None:
        self.ledger.remove(self.part, self.num_bytes)

    def becomes(self, part: Part) -> None:
        """Book the same bytes under another part."""
        if part != self.part:
            self.ledger.remove(self.part, self.num_bytes)
            self.part = part
            self.ledger.add(part, self.num_bytes)
