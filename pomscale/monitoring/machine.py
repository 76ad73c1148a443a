"""The machine, versions and commit that measured figures depend on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pomscale.base import installation
from pomscale.runs.code_state import code_state

_PACKAGES = ("torch", "numpy", "torchdata", "webdataset", "diffusers", "deepspeed", "megatron-energon")


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
        "commit": commit or _commit_of_copy() or "unknown",
        "host": platform.platform(),
        "num_cpus": os.cpu_count(),
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": sys.version.split()[0],
        "versions": versions,
    }


def _commit_of_copy() -> str:
    """Return the commit that a frozen copy of the code was made of; '' if this is no copy."""
    state, _ = code_state()
    commit = state.get("git_commit")
    return f"{commit[:7]}{'-dirty' if state.get('dirty') else ''}" if commit else ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
