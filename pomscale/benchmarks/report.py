"""Report of a benchmark, with the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pomscale.base import installation
from pomscale.base.files import atomic_write

_PACKAGES = ("torch", "numpy", "torchdata", "webdataset", "diffusers", "deepspeed", "megatron-energon")


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


def machine() -> dict[str, Any]:
    """Return the machine, versions and commit that figures depend on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=installation.root(),
    ).stdout.strip()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "host": platform.platform(),
        "num_cpus": os.cpu_count(),
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": sys.version.split()[0],
        "versions": versions,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
