"""pipeline.json: the stages of a pipeline and their job folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.record.job import Condition, Stored, stored_as
from pomscale.base.errors import PomscaleError
from pomscale.base.files import make_folder, write_text

PIPELINE_FILE = "pipeline.json"


@dataclass(frozen=True)
class Stage(Stored):
    """One stage as it was launched.

    after: the condition by name, for the stages that it waits for. made_from: checksum of its recipe or commands.
    """

    name: str
    job_folder: str = field(metadata=stored_as("home"))
    after: dict[str, Condition]
    made_from: str


@dataclass(frozen=True)
class Pipeline(Stored):
    """Content of pipeline.json, which names its own folder as well. command_line: what was typed, in the folder cwd."""

    name: str
    cluster: str
    command_line: list[str]
    cwd: str
    stages: list[Stage]

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"stages": [stage.to_dict() for stage in self.stages]}


def read_pipeline(folder: Path) -> Pipeline:
    """Read the pipeline.json of a folder that has one. PomscaleError if it cannot be read."""
    path = folder / PIPELINE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["stages"] = [Stage.from_dict(stage) for stage in content["stages"]]
        return Pipeline.from_dict(content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PomscaleError(f"{path} cannot be read: {error}") from error


def write_pipeline(folder: Path, pipeline: Pipeline) -> None:
    make_folder(folder)
    content = pipeline.to_dict() | {"home": str(folder.absolute())}
    write_text(folder / PIPELINE_FILE, json.dumps(content, indent=1))


def stage_moves(folder: Path) -> dict[Path, Path]:
    """Return where the job folders of the stages lie now, by the path that they were made at; {} for no pipeline."""
    try:
        content = json.loads((folder / PIPELINE_FILE).read_bytes())
        made_at = [Path(stage["home"]) for stage in content["stages"]]
        return dict(zip(made_at, stage_folders(folder, content), strict=True))
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged, which `pomscale launch` reports
        return {}


def stage_folders(folder: Path, content: Mapping[str, Any]) -> list[Path]:
    """Return the job folders of the stages where they lie now: the pipeline may have been moved or copied with them.

    Args:
        folder: Folder of the pipeline.
        content: Content of its pipeline.json. KeyError or TypeError if it is not one.
    """
    then = content.get("home")  # absent in a file of an older version
    found = []
    for stage in content["stages"]:
        recorded = Path(stage["home"])
        beside = folder / (stage["name"] if then is None else os.path.relpath(recorded, then))
        found.append(Path(os.path.normpath(beside)) if beside.is_dir() else recorded)
    return found
