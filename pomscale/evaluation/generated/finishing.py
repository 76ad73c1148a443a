"""The end of an evaluation: parts are put together, metrics computed and files written."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError
from pomscale.base.files import write_text
from pomscale.evaluation.generated.evaluation import Evaluation
from pomscale.evaluation.generated.figures import Compared, Totals, compute, put_together
from pomscale.evaluation.generated.metric_choice import Choice, Reference
from pomscale.evaluation.generated.pictures_out import write_npz
from pomscale.evaluation.generated.statistics_files import write_statistics
from pomscale.evaluation.generated.work_folder import FAILURES, PartFiles, Side
from pomscale.metrics.moments import Gaussian, Moments

_MOST_LISTED = 3


def finish(evaluation: Evaluation, work: Path, files: dict[Side, PartFiles]) -> dict[str, Any]:
    """Put the parts together, write the files that are asked for, and return the result."""
    totals: dict[Side, Totals] = {}
    for side, measurement in evaluation.measurements.items():
        num_parts = sum(job.side == side for job in evaluation.jobs())
        totals[side] = put_together(files[side], num_parts, measurement.wants)
    _check_failures(evaluation, work, totals)
    source, reference, statistics = totals["source"], totals.get("reference"), evaluation.reference.statistics
    figures = compute(evaluation.choice, Compared(source, reference, statistics), evaluation.request.conventions)
    settings = evaluation.settings()
    if "source" in settings:
        settings["source"]["measured"] = source.count
    settings["reference"] = _reference_settings(evaluation.reference, reference)
    _write_outputs(evaluation, totals["source"], files["source"], settings)
    request = evaluation.request
    return {
        "metrics": figures.values,
        "settings": settings,
        "details": figures.details,
        "warnings": [*evaluation.warnings({side: one.count for side, one in totals.items()}), *figures.warnings],
        "left_out": evaluation.choice.left_out,
        "pictures": {side: one.facts() for side, one in totals.items()},
        "parts": {"part": request.part, "batch": evaluation.batch},
    }


def _check_failures(evaluation: Evaluation, work: Path, totals: dict[Side, Totals]) -> None:
    """List the pictures that cannot be read. InputError if there are more than are allowed."""
    found = [
        {"side": side, "picture": where, "reason": reason}
        for side, one in totals.items()
        for where, reason in one.failures
    ]
    if not found:
        return
    write_text(work / FAILURES, "".join(json.dumps(failure) + "\n" for failure in found))
    check_skipped(len(found), evaluation, work)


def check_skipped(number: int, evaluation: Evaluation, work: Path) -> None:
    """Raise InputError, which names the first ones, if more pictures or clips than allowed could not be measured."""
    if number <= evaluation.request.max_skipped:
        return
    with (work / FAILURES).open(encoding="utf-8") as lines:
        first = [json.loads(line) for line in itertools.islice(lines, _MOST_LISTED)]
    shown = "; ".join(f"{failure['picture']}: {failure['reason']}" for failure in first)
    more = f" and {number - len(first):,} more" if number > len(first) else ""
    raise InputError(
        f"{number:,} {evaluation.kind} cannot be read, so the figures would be of others than you asked for: {shown}"
        f"{more}; all are in {work / FAILURES}. Mend or remove them, or leave them out with --max-skipped {number}"
    )


def _reference_settings(reference: Reference, totals: Totals | None) -> dict[str, Any] | None:
    settings: dict[str, Any] = {}
    if reference.statistics is not None:
        statistics = reference.statistics
        counts = {name: gaussian.count for name, gaussian in statistics.gaussians.items()}
        of_file = {"path": str(statistics.path), "sha256": statistics.sha256, "counts": counts}
        settings["statistics"] = {**of_file, "settings": statistics.settings}
    if reference.pictures is not None and totals is not None:
        settings["pictures"] = {
            **reference.pictures.settings(),
            "pixels_sha256": totals.sha256,
            "measured": totals.count,
        }
    return settings or None


def _write_outputs(evaluation: Evaluation, totals: Totals, files: PartFiles, settings: dict[str, Any]) -> None:
    outputs, source = evaluation.request.outputs, evaluation.source
    parts = range(sum(job.side == "source" for job in evaluation.jobs()))
    if outputs.npz is not None:
        assert source.size is not None
        height, width = source.size
        shape = (totals.count, height, width, source.num_channels)
        write_npz(outputs.npz, [files.pixels(part) for part in parts], shape, files.labels(parts))
    if outputs.statistics is not None:
        gaussians = _gaussians(evaluation.choice, totals)
        made_of = {**settings, "crop": source.crop, "pixels_sha256": totals.sha256}
        write_statistics(outputs.statistics, gaussians, evaluation.extractors[0].identity, made_of)


def _gaussians(choice: Choice, totals: Totals) -> dict[Any, Gaussian]:
    found = {}
    for want in choice.for_file:
        moments = totals.sums[want]
        assert isinstance(moments, Moments)
        try:
            found[want.feature] = moments.gaussian()
        except ValueError as error:
            raise InputError(f"--write-statistics: {error}") from error
    return found
