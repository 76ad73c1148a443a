"""Variables that reach SLURM's commands: configuration and identity, but no option that a user has set for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.scheduler import environment
from launch.scheduler.environment import OPTION_PREFIXES, for_questions, for_submission, submitting
from support.paths import ROOT

OPTIONS = {f"{prefix}PARTITION": "elsewhere" for prefix in OPTION_PREFIXES}
KEPT = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "token", "SLURM_CLUSTERS": "two", "PATH": "/bin", "SQUEUE": "x"}
OF_A_JOB = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "8", "RANK": "3", "TMPDIR": "/job", "POMSCALE_LOCAL_RESTART": "0"}


@pytest.mark.parametrize("prefix", ["SBATCH", "SQUEUE", "SACCT", "SCONTROL", "SINFO", "SALLOC", "SRUN", "SCANCEL"])
def test_options_of_every_command_are_removed(prefix: str) -> None:
    assert f"{prefix}_" in OPTION_PREFIXES
    asked = {f"{prefix}_ACCOUNT": "elsewhere", **KEPT}
    assert for_questions(asked) == KEPT | {"SLURM_BITSTR_LEN": "0"}
    assert for_submission(asked) == KEPT


def test_a_question_has_the_job_that_it_comes_from_and_a_submission_has_not() -> None:
    everything = OPTIONS | KEPT | OF_A_JOB
    assert for_questions(everything) == KEPT | OF_A_JOB | {"SLURM_BITSTR_LEN": "0"}
    assert for_submission(everything) == KEPT
    assert for_submission({"POMSCALE_LOCAL_JOB": "12", "RANK": "0"}) == {}
    assert for_submission({"RANK": "0", "TMPDIR": "/mine"}) == {"RANK": "0", "TMPDIR": "/mine"}, "no job's"


def test_what_others_start_has_the_environment_of_a_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", "elsewhere")
    with submitting():
        assert "SBATCH_ACCOUNT" not in environment.os.environ
    assert environment.os.environ["SBATCH_ACCOUNT"] == "elsewhere"


def test_what_is_not_used_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    environment._warn_once.cache_clear()
    for _ in range(2):
        environment.warn_of_ignored_options(OPTIONS | KEPT)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "not used: SBATCH_PARTITION=elsewhere, SRUN_PARTITION=elsewhere; " in said
    assert "cluster profile" in said
    environment.warn_of_ignored_options(KEPT | OF_A_JOB | {"SRUN_DEBUG": "3", "SQUEUE_FORMAT": "%i"})
    assert capsys.readouterr().err == "", "srun sets its own variables, and those of squeue ask for nothing"


def test_the_end_of_a_job_script_removes_the_same() -> None:
    text = Path(ROOT, "slurm", "requeue.sh").read_text(encoding="utf-8")
    assert set(re.findall(r"\$\{!(\w+)@\}", text)) == set(OPTION_PREFIXES)
