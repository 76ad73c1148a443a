"""Choice of the checkpoints that are kept: the last few, one per so many samples, and the best by a metric.

judged.json   {samples: value of the metric}, beside the checkpoints, which are never written to once complete
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pomscale.base.errors import PomscaleError
from pomscale.base.files import write_text
from pomscale.config.engine import CheckpointConfig
from pomscale.runs.layout import JUDGED_FILE


def expendable(complete: Sequence[int], judged: Mapping[int, float], config: CheckpointConfig) -> list[int]:
    """Return which of the checkpoints `complete` (their samples, ascending) may be deleted, in the same order.

    Kept are the last `keep_last`; the first at or after each multiple of `keep_every_samples`, since batches need not
    end on a multiple; the `keep_best` of lowest value in `judged`, the newer of equals. Once they are deleted, the same
    call returns [].
    """
    keep = set(complete[-config.keep_last :])
    if config.keep_every_samples is not None:
        every = config.keep_every_samples
        before = [0, *complete]
        keep |= {samples for last, samples in zip(before, complete, strict=False) if samples // every > last // every}
    candidates = [samples for samples in complete if math.isfinite(judged.get(samples, math.nan))]
    keep.update(sorted(candidates, key=lambda samples: (judged[samples], -samples))[: config.keep_best])
    return [samples for samples in complete if samples not in keep]


def read_judged(root: Path) -> dict[int, float]:
    """Return the metric's values by samples; empty without the file. Raises PomscaleError if it cannot be read."""
    path = root / JUDGED_FILE
    if not path.exists():
        return {}
    try:
        return {int(samples): float(value) for samples, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError) as error:
        raise PomscaleError(
            f"{path} cannot be read ({error}), so it is not known which checkpoints are the best, and none is deleted; "
            "delete this file to continue without these values"
        ) from error


def write_judged(root: Path, judged: Mapping[int, float], known: Collection[int | None]) -> None:
    """Write the values of the checkpoints `known`. Raises PomscaleError if that is impossible."""
    root.mkdir(parents=True, exist_ok=True)  # something may be measured before the first checkpoint
    kept = {str(samples): value for samples, value in sorted(judged.items()) if samples in known}
    write_text(root / JUDGED_FILE, json.dumps(kept, indent=1))
