"""Outcome of each start of a run: outcome.json for the newest start, outcomes/ by start and rank.

outcome.json is absent while a start runs, and after a kill. A rank writes its outcome when it ends well as rank 0, and
whenever it fails.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pomscale.base.files import make_folder, write_text
from pomscale.runs.layout import OUTCOME_FILE, outcome_path, outcome_paths, stacks_paths, start_and_rank_of


def write_outcome(
    run_folder: Path, start: int, rank: int, state: str, *, samples: int | None = None, reason: str = ""
) -> None:
    """Record how a start of the run ended, as far as one rank knows.

    outcome.json is that of rank 0 where all went well, else that of the first rank that writes one: it has the cause,
    while the others mostly have lost their connection to it. A start that fails before its recipe is accepted leaves
    the outcome of the start before it in place.

    Args:
        run_folder: the run folder.
        start: number of the start.
        rank: number of this process.
        state: "finished"; "stopped" (on request, with everything saved); "quit" (a second signal: at once, without a
            save); "hung"; or "failed".
        samples: samples seen by the optimiser.
        reason: why, for people.

    Raises:
        PomscaleError: the outcome cannot be written.
    """
    outcome = {"state": state, "incarnation": start, "rank": rank, "ended_unix_s": time.time()}
    if samples is not None:
        outcome["samples"] = samples
    if reason:
        outcome["reason"] = reason
    text = json.dumps(outcome, indent=1)
    path = outcome_path(run_folder, start, rank)
    make_folder(path.parent)
    write_text(path, text)
    newest = read_outcome(run_folder)
    if newest is None or newest["incarnation"] < start:
        write_text(run_folder / OUTCOME_FILE, text)


def read_outcome(run_folder: Path) -> dict[str, Any] | None:
    """Return outcome.json; None without it, and where it names no start or no state."""
    try:
        outcome = json.loads((run_folder / OUTCOME_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(outcome, dict):
        return None
    has_both = isinstance(outcome.get("incarnation"), int) and isinstance(outcome.get("state"), str)
    return outcome if has_both else None


def outcomes_after(run_folder: Path, start: int) -> dict[int, dict[str, Any]]:
    """Return the outcomes by rank of the newest start with a number above `start`; empty without any.

    A rank that hung in foreign code, with Python's lock held, could leave nothing but its stacks: it counts as hung.
    """
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for path in outcome_paths(run_folder):
        number, rank = start_and_rank_of(path)
        found.setdefault(number, {})[rank] = json.loads(path.read_text(encoding="utf-8"))
    for path in stacks_paths(run_folder):
        number, rank = start_and_rank_of(path)
        hung = {"state": "hung", "incarnation": number, "rank": rank, "reason": f"stacks in {path}"}
        if path.stat().st_size:
            found.setdefault(number, {}).setdefault(rank, hung | {"ended_unix_s": path.stat().st_mtime})
    newest = max(found, default=0)
    return found[newest] if newest > start else {}


def is_finished(run_folder: Path) -> bool:
    """Whether the newest start came to the end of its recipe, validation included."""
    outcome = read_outcome(run_folder)
    return outcome is not None and outcome["state"] == "finished"
