"""slurm/requeue.sh, which stands at the end of every job script: what the supervisor wishes, and what SLURM says."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launch.scheduler.slurm import hosts_of
from support.cluster import SlurmCluster
from support.launched import excluded
from support.paths import ROOT

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "slurm" / "requeue.sh"
# Its supervisor wants another start, once, without the hosts that are named.
JOB = """
name=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
attempt="{job_folder}/attempts/${{name:-$SLURM_JOB_ID}}-${{SLURM_RESTART_COUNT:-0}}"
mkdir -p "$attempt"
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ]; then exit 0; fi
{before}
echo {suspects} > "$attempt/requeue"
source {script}
pomscale_end 75 "{job_folder}"
"""


def submit(slurm: SlurmCluster, folder: Path, *options: str, suspects: str = "", before: str = "") -> str:
    job_folder = folder / "a job folder"
    text = JOB.format(job_folder=job_folder, suspects=suspects, before=before, script=SCRIPT)
    return slurm.submit(text, "--requeue", *options, cwd=folder)


def starts(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "a job folder" / "attempts").iterdir())


def test_every_task_of_an_array_is_requeued_by_itself(slurm: SlurmCluster, tmp_path: Path) -> None:
    """The last one has the number of the whole array. The first goes on while that is requeued."""
    job_id = submit(slurm, tmp_path, "--array=0-1", before='if [ "$SLURM_ARRAY_TASK_ID" = 0 ]; then sleep 12; exit; fi')
    for task in (0, 1):
        slurm.wait_for(f"{job_id}_{task}", "COMPLETED")
    assert starts(tmp_path) == [f"{job_id}_0-0", f"{job_id}_1-0", f"{job_id}_1-1"]


def test_a_users_options_for_slurms_commands_change_nothing(slurm: SlurmCluster, tmp_path: Path) -> None:
    """With SQUEUE_STATES the job would look gone, and with SINFO_PARTITION its partition empty."""
    options = {"SQUEUE_STATES": "PENDING", "SQUEUE_FORMAT2": "name", "SINFO_PARTITION": "high", "SINFO_STATES": "down"}
    export = ",".join(["ALL", *(f"{name}={value}" for name, value in options.items())])
    job_id = submit(slurm, tmp_path, f"--export={export}", suspects="127.0.0.2")
    slurm.wait_for(job_id, "COMPLETED")
    assert starts(tmp_path) == [f"{job_id}-0", f"{job_id}-1"]
    assert excluded(slurm, job_id) == "127.0.0.2"


def test_the_words_of_a_refusal_are_kept(slurm: SlurmCluster, tmp_path: Path) -> None:
    """It is asked for several times, since a controller may be away."""
    job_id = submit(slurm, tmp_path, "--no-requeue", before="sleep() { command sleep 0.1; }")
    slurm.wait_for(job_id, "FAILED")
    assert starts(tmp_path) == [f"{job_id}-0"]
    refused = tmp_path / "a job folder" / "attempts" / f"{job_id}-0" / "refused"
    words = f"Requested operation is presently disabled for job {job_id}"
    assert refused.read_text() == f"{words}\n"
    assert f"not requeued, SLURM refuses: {words}" in (tmp_path / f"slurm-{job_id}.out").read_text()


def test_what_the_job_was_submitted_without_stays_out(slurm: SlurmCluster, tmp_path: Path) -> None:
    job_id = submit(slurm, tmp_path, "--exclude=127.0.0.3", suspects="127.0.0.2")
    slurm.wait_for(job_id, "COMPLETED")
    assert hosts_of(excluded(slurm, job_id)) == ["127.0.0.3", "127.0.0.2"]


def test_no_node_is_excluded_where_too_few_would_be_left(slurm: SlurmCluster, tmp_path: Path) -> None:
    """It would wait for good."""
    job_id = submit(slurm, tmp_path, "--nodes=3", suspects="127.0.0.2")
    slurm.wait_for(job_id, "COMPLETED")
    assert excluded(slurm, job_id) == "(null)"
    assert starts(tmp_path) == [f"{job_id}-0", f"{job_id}-1"]


def test_a_controller_that_is_restarted_is_waited_for(slurm: SlurmCluster, tmp_path: Path) -> None:
    job_id = submit(slurm, tmp_path, before="until [ -e ended ]; do sleep 0.1; done")
    slurm.wait_for(job_id, "RUNNING")
    time.sleep(8)  # so long it may take the controller to write down what it knows
    slurm.kill_controller()
    (tmp_path / "ended").touch()
    time.sleep(8)
    slurm.start_controller()
    slurm.wait_for(job_id, "COMPLETED")
    assert starts(tmp_path) == [f"{job_id}-0", f"{job_id}-1"]


def test_a_start_that_slurm_gave_up_does_not_disturb_the_next(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Its node was taken for dead, and wakes up."""
    end = f'source {SCRIPT}; SLURM_RESTART_COUNT=7; mkdir -p "{tmp_path}/a job folder/attempts/$SLURM_JOB_ID-7"; '
    end += (
        f'touch "{tmp_path}/a job folder/attempts/$SLURM_JOB_ID-7/requeue"; pomscale_end 75 "{tmp_path}/a job folder"'
    )
    job_id = submit(slurm, tmp_path, before=end)
    slurm.wait_for(job_id, "FAILED")
    assert starts(tmp_path) == [f"{job_id}-0", f"{job_id}-7"]
    assert "has started this job again already" in (tmp_path / f"slurm-{job_id}.out").read_text()
