"""An evaluation that is opened and checked: its pictures or clips, its parts, its plan and its settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pomscale.base.errors import InputError
from pomscale.codecs.extractors import build_extractor
from pomscale.codecs.extractors.base import Extractor
from pomscale.distributed.world import resolve_device
from pomscale.evaluation.generated.alike import check_alike, check_frames, frame_settings
from pomscale.evaluation.generated.crops import check_crops
from pomscale.evaluation.generated.generated_clips import Generated
from pomscale.evaluation.generated.measure import Measurement, check_pictures
from pomscale.evaluation.generated.metric_choice import (
    Choice,
    Reference,
    Sides,
    check_names,
    choose,
    owner_of,
    reasons,
    warnings_of,
)
from pomscale.evaluation.generated.opening import Opening, open_pictures, open_reference
from pomscale.evaluation.generated.picture_sets import Kind, kind_of
from pomscale.evaluation.generated.request import Request
from pomscale.evaluation.generated.work_folder import PartFiles, Side
from pomscale.metrics.inception_score import assign_splits
from pomscale.runs.code_state import versions

_FORMAT = 2
_WORK = "evaluations"
_BATCHES: dict[Kind, int] = {"pictures": 64, "clips": 8}
_PARTS: dict[Kind, int] = {"pictures": 1_000, "clips": 64}  # a hundredth of a larger set


class Job(NamedTuple):
    """One part of one side."""

    side: Side
    part: int
    bounds: tuple[int, int]

    @property
    def num_pictures(self) -> int:
        return self.bounds[1] - self.bounds[0]


class Evaluation:
    """An evaluation whose source, reference and extractors are open, and known to fit each other."""

    def __init__(self, request: Request) -> None:
        """Open everything that is asked for, and check it. InputError, one clear line, if it cannot be measured."""
        request.outputs.check()
        self.request = request
        self.extractors, opening, self.reference = _open_others(request)
        self.source = open_pictures(request.source, opening)
        self.kind = kind_of(self.source)
        self.batch = request.batch or _BATCHES[self.kind]
        if self.reference.pictures is not None:
            check_alike(self.source, self.reference.pictures, request.repeats_grey)
        sides = Sides(self.source, self.reference)
        self.choice: Choice = choose(
            self.extractors,
            sides,
            request.metrics,
            splits=request.conventions.splits,
            writes_statistics=request.outputs.statistics is not None,
            writes_pictures=(request.outputs.npz or request.outputs.tars) is not None,
        )
        self._check()
        self.measurements = self._measurements()

    def _check(self) -> None:
        request, pictures, statistics = self.request, self.reference.pictures, self.reference.statistics
        for one in filter(None, (self.source, pictures)):
            check_pictures(one, self.extractors, request.repeats_grey)
        if request.outputs.npz is not None and self.kind == "clips":
            raise InputError(f"--write-npz: holds pictures, and {self.source.name} has clips; write --write-tars")
        self._check_subsets()
        if statistics is not None:
            owner = self.extractors[owner_of(statistics, self.extractors)]
            dims = {name: width for name, width in owner.dims.items() if width is not None}
            used = {want.feature for want in self.choice.of_source if want.kept == "moments"}
            statistics.check(
                owner.identity, dims, tuple(name for name in dims if name in used & {*statistics.gaussians})
            )
            check_frames(statistics, self.source)
        if not request.any_crop:
            theirs_crop = pictures.crop if pictures is not None else (statistics and statistics.settings.get("crop"))
            check_crops(str(request.reference), theirs_crop or None, self.source.crop)

    def _check_subsets(self) -> None:
        """Raise InputError if KID's subsets are larger than a set."""
        subsets = self.request.conventions.kid_subsets
        for one in filter(None, (self.source, self.reference.pictures)):
            if subsets is not None and "kid" in self.choice.wants and one.num_pictures < subsets[1]:
                raise InputError(
                    f"--kid-subsets {subsets[0]}x{subsets[1]}: {one.name} has {one.num_pictures:,} pictures, too few "
                    f"for a subset; take smaller ones, or leave it out"
                )

    def _measurements(self) -> dict[Side, Measurement]:
        request, device = self.request, resolve_device(self.request.opening.model.device)
        common = {"extractors": self.extractors, "batch": self.batch, "repeats_grey": request.repeats_grey}
        # Clips are large: no more than a batch of them are to be in memory.
        ahead = device.type == "cuda" and self.kind == "pictures"
        splits = None
        if any(want.kept == "splits" for want in self.choice.of_source):
            conventions = request.conventions
            splits = assign_splits(self.source.num_pictures, conventions.splits, conventions.shuffle_seed)
        found: dict[Side, Measurement] = {
            "source": Measurement(
                self.source,
                wants=self.choice.of_source,
                splits=splits,
                ahead=ahead,
                tars=request.outputs.tars,
                keeps_pixels=request.outputs.npz is not None,
                **common,  # type: ignore[arg-type]
            )
        }
        wants = self.choice.of_reference(self.reference)
        if self.reference.pictures is not None and wants:
            found["reference"] = Measurement(self.reference.pictures, wants=wants, ahead=ahead, **common)  # type: ignore[arg-type]
        return found

    def jobs(self) -> list[Job]:
        """Return all parts; those of the source first."""
        return [
            Job(side, part, bounds)
            for side, measurement in self.measurements.items()
            for part, bounds in enumerate(
                _bounds(measurement.pictures.num_pictures, self.request.part, _PARTS[self.kind])
            )
        ]

    def plan(self) -> dict[str, Any]:
        """Return JSON with everything that decides the figures and the files."""
        request, statistics = self.request, self.reference.statistics
        frames = frame_settings(self.source)
        return {
            **({} if frames is None else {"frames": frames}),
            "format": _FORMAT,
            "source": self.source.identity(),
            "reference": None if self.reference.pictures is None else self.reference.pictures.identity(),
            "statistics": None if statistics is None else statistics.sha256,
            "extractors": [extractor.identity for extractor in self.extractors],
            "metrics": list(self.choice.wants),
            "conventions": request.conventions.settings(list(self.choice.wants)),
            "grey": "repeat" if request.repeats_grey else None,
            "batch": self.batch,
            "part": request.part,
            "outputs": [path and str(path) for path in (request.outputs.npz, request.outputs.tars)],
            "statistics_file": request.outputs.statistics and str(request.outputs.statistics),
        }

    def work(self) -> Path:
        """Return the folder that the processes share."""
        if self.request.work is not None:
            return self.request.work
        digest = hashlib.sha256(json.dumps(self.plan(), sort_keys=True).encode()).hexdigest()
        return Path(_WORK) / f"{Path(self.request.source.rstrip('/')).stem}-{digest[:10]}"

    def describe(self) -> str:
        """Return what would be done, for people."""
        lines = [f"source: {self.source.num_pictures:,} {self.kind} of {self.request.source}"]
        if self.reference.pictures is not None:
            number = self.reference.pictures.num_pictures
            lines.append(f"reference: {number:,} {self.kind} of {self.request.reference}")
        if self.reference.statistics is not None:
            lines.append(f"reference: statistics of {', '.join(self.reference.statistics.gaussians)} features")
        lines.append(f"metrics: {', '.join(self.choice.wants) or 'none'}")
        lines += [f"left out: {reason}" for reason in reasons(self.choice.left_out)]
        lines += [f"warning: {text}" for text in self.warnings()]
        jobs = self.jobs()
        work = self.work()
        done = sum(self.measurements[job.side].is_done(PartFiles(work, job.side), job.part) for job in jobs)
        lines.append(f"parts: {len(jobs):,}, of which {done:,} are done, in {work}")
        return "\n".join(lines)

    def warnings(self, measured: Mapping[str, int] | None = None) -> list[str]:
        """Return a sentence for each metric of too few pictures.

        Args:
            measured: Number of pictures of each side that could be read; None = all, before they are read.
        """
        pictures, statistics = self.reference.pictures, self.reference.statistics
        numbers: dict[str, int] = {"source": self.source.num_pictures}
        if pictures is not None:
            numbers["reference"] = pictures.num_pictures
        elif statistics is not None:
            known = [gaussian.count for gaussian in statistics.gaussians.values() if gaussian.count is not None]
            numbers |= {"reference": min(known)} if known else {}
        return warnings_of(self.choice, {**numbers, **(measured or {})}, self.kind)

    def settings(self) -> dict[str, Any]:
        """Return every setting that made the figures, as JSON."""
        own = self.source.settings()
        settings: dict[str, Any] = own if isinstance(self.source, Generated) else {"source": own}
        settings["extractors"] = {
            extractor.name: {"spec": spec, "identity": extractor.identity}
            for spec, extractor in zip(dict.fromkeys(self.request.extractors), self.extractors, strict=True)
        }
        if (frames := frame_settings(self.source)) is not None:
            settings["frames"] = frames
        settings["grey"] = "repeat" if self.request.repeats_grey else None
        settings["conventions"] = self.request.conventions.settings(list(self.choice.wants))
        settings["versions"] = versions()
        return settings


def check_without_source(request: Request) -> None:
    """Raise InputError, one clear line, for what cannot be measured whatever the source will be."""
    request.outputs.check()
    check_names(request.metrics)
    extractors, _, reference = _open_others(request)
    if reference.pictures is not None:
        check_pictures(reference.pictures, extractors, request.repeats_grey)


def _open_others(request: Request) -> tuple[list[Extractor], Opening, Reference]:
    """Return the extractors, the way in which pictures are opened for them, and the reference."""
    device = resolve_device(request.opening.model.device)
    extractors = [build_extractor(spec, device) for spec in dict.fromkeys(request.extractors)]
    opening = replace(request.opening, with_captions=any(extractor.name == "clip" for extractor in extractors))
    return extractors, opening, open_reference(request.reference, replace(opening, num=request.num_reference))


def _bounds(count: int, part: int | None, least: int) -> Iterator[tuple[int, int]]:
    """Yield first and last + 1 picture of each part."""
    size = part or max(least, -(-count // 100))
    return ((begin, min(begin + size, count)) for begin in range(0, count, size))
