"""Report of a benchmark, with the machine it ran on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pomscale.base.files import atomic_write
from pomscale.monitoring.machine import machine


@dataclass
class BenchReport:
    """Rows of figures, and lines that compare ratios with targets; printed as a table, kept as JSON.

    notes say what was left out, and why. failures name results that are wrong: with one, the command ends with 1.
    """

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, what: str, **figures: Any) -> None:
        """Add a row of figures and print it at once, so that long benchmarks are not silent."""
        self.rows.append({"what": what, **figures})
        shown = "  ".join(f"{name} {_shown(value)}" for name, value in figures.items())
        print(f"{what:<58}{shown}", flush=True)

    def compare(self, what: str, value: float, wanted: float, at_least: bool = True) -> None:
        """Print a figure beside the wanted one. The exit code never depends on it: benchmarks measure."""
        reached = value >= wanted if at_least else value <= wanted
        relation = "at least" if at_least else "at most"
        self.verdicts.append(f"{what}: {value:.3g}, wanted {relation} {wanted:g}: {'reached' if reached else 'MISSED'}")
        print(self.verdicts[-1], flush=True)

    def note(self, line: str) -> None:
        """Print and keep a line that says what is not in the rows."""
        self.notes.append(line)
        print(line, flush=True)

    def save(self, path: Path) -> None:
        """Write the report as JSON, with machine, versions and commit; lists that are empty are left out."""
        content = {"benchmark": self.name, **machine(), "rows": self.rows, "verdicts": self.verdicts}
        content |= {name: lines for name, lines in (("notes", self.notes), ("failures", self.failures)) if lines}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as stream:
            stream.write((json.dumps(content, indent=1) + "\n").encode())

    def write(self, path: Path) -> None:
        """Save the report, and print where."""
        self.save(path)
        print(f"wrote {path}")


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
