"""Names on disk and in pickles, which jobs that an older version launched depend on."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from launch.record.job import Ending, JobSpec, StartRecord, keep
from launch.record.pipeline import Pipeline, Stage, read_pipeline, write_pipeline
from launch.task import LocalTask, SlurmTask
from pomscale.base.errors import PomscaleError


def test_keys_on_disk_are_older_than_the_names_of_fields(tmp_path: Path) -> None:
    spec = JobSpec("/runs/x", "x", [["info"]], "/", wait_for={"/runs/y": "ok"})
    assert spec.to_dict()["home"] == "/runs/x"
    assert "job_folder" not in spec.to_dict()
    keep(tmp_path / "job.json", spec)
    assert JobSpec.read(tmp_path / "job.json") == spec
    record = StartRecord("7", 0, ["n1"], 1, 1.0, 3)
    assert record.to_dict()["newest_generation"] == 3
    assert StartRecord.from_dict(record.to_dict() | {"of_a_newer_version": 1}) == record
    ending = Ending(0, "n1", 1, 1.0, 2.0, -15, ended_by="SIGTERM")
    assert ending.to_dict()["told_to_end"] == "SIGTERM"
    assert Ending.from_dict(ending.to_dict()) == ending


def test_a_pipeline_is_read_as_it_was_written(tmp_path: Path) -> None:
    stage = Stage("train", "/runs/x", {"encode": "ok"}, "abc")
    pipeline = Pipeline("all", "local", ["pomscale"], "/", [stage])
    write_pipeline(tmp_path, pipeline)
    assert '"home": "/runs/x"' in (tmp_path / "pipeline.json").read_text()
    assert read_pipeline(tmp_path) == pipeline
    (tmp_path / "pipeline.json").write_text('{"stages": [{"name": "train"}]}')
    with pytest.raises(PomscaleError, match="cannot be read"):
        read_pipeline(tmp_path)


@pytest.mark.parametrize("kind", [SlurmTask, LocalTask])
def test_frozen_code_can_unpickle_a_task(kind: type[SlurmTask] | type[LocalTask]) -> None:
    """Any version has launch.task.SlurmTask and LocalTask, with the one field `home`."""
    task = kind("/runs/x")
    assert vars(task) == {"home": "/runs/x"}
    assert kind.__module__ == "launch.task"
    assert pickle.loads(pickle.dumps(task)) == task
