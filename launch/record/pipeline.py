"""pipeline.json: which stages a pipeline has, and where they live."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.submission.job_script import Condition
from pomscale.base.errors import PomscaleError
from pomscale.base.files import make_folder, write_text

PIPELINE_FILE = "pipeline.json"


@dataclass(frozen=True)
class Stage:
    """One stage as it was launched. made_from: checksum of its recipe or commands."""

    name: str
    job_folder: str
    after: dict[str, Condition]
    made_from: str


@dataclass(frozen=True)
class Pipeline:
    """What pipeline.json says. command_line, cwd: what was typed, and where."""

    name: str
    cluster: str
    command_line: list[str]
    cwd: str
    stages: list[Stage]


def read_pipeline(folder: Path) -> Pipeline:
    """Of a folder that has a pipeline.json. PomscaleError if it cannot be read."""
    path = folder / PIPELINE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stages = [Stage(**stage) for stage in content.pop("stages")]
        return Pipeline(**content, stages=stages)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PomscaleError(f"{path} cannot be read: {error}") from error


def write_pipeline(folder: Path, pipeline: Pipeline) -> None:
    make_folder(folder)
    write_text(folder / PIPELINE_FILE, json.dumps(asdict(pipeline), indent=1))
