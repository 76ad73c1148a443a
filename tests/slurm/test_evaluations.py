"""Evaluations of checkpoints as jobs beside a training run, on a real SLURM."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launch.node.evaluations import evaluation_folder
from launch.record.job import read_submissions
from launch.record.result import final_verdict
from pomscale.monitoring.report.write import write_report
from pomscale.runs.checkpoint_folder import complete_checkpoints, samples_of
from pomscale.runs.evaluation_log import read_evaluations
from pomscale.runs.layout import EVALUATED_FOLDER, FAILED_FILE, JOBS_FILE
from support.cluster import SlurmCluster
from support.launched import Launched, hold, launch
from support.running import GLOBAL_BATCH, rows, wait_until

WITH_AND_WITHOUT_ACCOUNTING = True
pytestmark = pytest.mark.slow

# The supervisor looks every 5 s: at least so long lies between two checkpoints.
STEP_S, NUM_STEPS, EVERY = "0.2", 60, 30
EVALUATED = [EVERY * GLOBAL_BATCH * number for number in (1, 2)]


def recipe_overrides(digits: Path) -> list[str]:
    evaluations = [
        {
            "name": "heldout",
            "every_samples": EVERY * GLOBAL_BATCH,
            "run": [
                "sample {checkpoint} --classes 0-3 --num-samples 2 --steps 2 --out {folder}/grid.png",
                "evaluate heldout {checkpoint} --out {folder}/figures.json",
            ],
        },
        {
            "name": "broken",
            "every_samples": EVALUATED[-1],
            "run": ["evaluate digits {folder}/none.npz --train {folder}/none --out {folder}/figures.json"],
        },
    ]
    return [
        f"training.total_samples={NUM_STEPS * GLOBAL_BATCH}",
        f"checkpoint={{every_samples: {EVERY * GLOBAL_BATCH}, keep_last: 1}}",
        f"validation={{path: {digits}/latents/heldout, every_samples: {EVERY * GLOBAL_BATCH}, num_samples: 64}}",
        f"evaluations={json.dumps(evaluations)}",
    ]


def wait_for_evaluations(run: Launched, job_folders: list[Path], timeout_s: float = 300) -> None:
    """Until all of them have come to an end."""
    deadline_s = time.monotonic() + timeout_s
    while any(final_verdict(job_folder) is None for job_folder in job_folders):
        told = [path.read_text()[-2000:] for job_folder in job_folders for path in job_folder.glob("logs/*.log")]
        assert time.monotonic() < deadline_s, "\n".join([run.told(), *told])
        time.sleep(0.5)


def test_checkpoints_are_evaluated_while_training_goes_on(
    slurm: SlurmCluster, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(slurm.environment, "UNHURRIED_S", STEP_S)
    # Not to the second checkpoint, with which the first goes, before the supervisor has seen to that.
    held = hold(slurm, monkeypatch, tmp_path / "held", EVALUATED[-1] - 10 * GLOBAL_BATCH)
    run = launch(slurm, tmp_path, digits, *recipe_overrides(digits), num_nodes=1)
    job_folders = [evaluation_folder(run.folder, "heldout", samples) for samples in EVALUATED]
    wait_until((job_folders[0] / JOBS_FILE).is_file, "the first checkpoint is not evaluated")
    held.unlink()
    run.finish()
    broken = evaluation_folder(run.folder, "broken", EVALUATED[-1])
    wait_for_evaluations(run, [*job_folders, broken])
    # What its supervisor does after its verdict.
    wait_until(
        lambda: (broken / FAILED_FILE).is_file() and not (broken / EVALUATED_FOLDER).exists(),
        "the failure is not noted",
        timeout_s=120,
    )

    # Of each checkpoint, although retention has left only the last: the very loss that training has measured itself.
    assert [samples_of(path) for path in complete_checkpoints(run.folder / "checkpoints")] == EVALUATED[-1:]
    measured = {row["samples"]: row["validation/loss"] for row in rows(run.folder) if "validation/loss" in row}
    found = {one.samples: one for one in read_evaluations(run.folder)}
    assert sorted(found) == EVALUATED
    for samples, one in found.items():
        assert one.metrics["evaluation/heldout/mean"] == pytest.approx(measured[samples], rel=1e-5)
        assert one.pictures["evaluation/heldout/grid"].is_file()
    assert not any((job_folder / EVALUATED_FOLDER).exists() for job_folder in job_folders), (
        "the files of the checkpoints are let go"
    )

    jobs = {job_folder: read_submissions(job_folder)[0] for job_folder in job_folders}
    training_ended_unix_s = json.loads((run.folder / "outcome.json").read_text())["ended_unix_s"]
    assert jobs[job_folders[0]].submitted_unix_s < training_ended_unix_s
    assert len({run.job_id, *(job.job_id for job in jobs.values())}) == 1 + len(job_folders)
    assert (job_folders[0] / "code").resolve() == (run.folder / "code").resolve(), "the code of the run"

    # One that fails is listed, and the run knows nothing of it.
    verdict = final_verdict(broken)
    assert verdict is not None
    assert "no class folders" in verdict.reason
    assert json.loads((broken / FAILED_FILE).read_text())["reason"] == verdict.reason
    assert not (broken / EVALUATED_FOLDER).exists()
    page = write_report([run.folder], tmp_path).html.read_text()
    assert "evaluation/heldout/mean" in page
    assert "no class folders" in page
