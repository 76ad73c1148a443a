"""What `pomscale launch` looks at before anything is submitted, and the job that it makes of a recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.command import Launch, launch
from launch.record.job import JobSpec, LaunchedAs, Submission, read_submissions, sole_launch
from launch.submission import prepared as prepared_module
from launch.submission.prepare import JobRequest, prepare_commands, prepare_encode, prepare_train
from launch.submission.prepared import Prepared
from launch.submission.submit import record_submission
from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.cluster import ClusterProfile
from pomscale.config.encode import EncodeRecipe
from pomscale.config.load import dump_recipe, load_train_recipe
from pomscale.config.train import TrainRecipe
from pomscale.runs.layout import CHECKPOINT_META
from pomscale.runs.outcome import write_outcome
from support.paths import RECIPES

BASE: dict[str, Any] = {
    "kind": "cluster",
    "scheduler": "slurm",
    "gpus_per_node": 0,
    "ranks_per_node": 2,
    "cpus_per_node": 8,
    "time_limit": "1:00:00",
}
ON_GPUS: dict[str, Any] = {"gpus_per_node": 4, "ranks_per_node": None}


def profile(**changes: Any) -> ClusterProfile:
    return ClusterProfile.model_validate({**BASE, **changes})


def prepare(recipe: Path, *overrides: str, on: ClusterProfile | None = None, **how: Any) -> Prepared:
    return prepare_train(recipe, overrides, JobRequest(on or profile(), "test", **how))


@pytest.fixture(autouse=True)
def _nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Preparing looks, and leaves everything as it was: what a test has written itself is all there is."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("job.json"))
    assert not list(tmp_path.rglob("code"))


# --- the job ---------------------------------------------------------------------------------------------------------


def test_a_training_run(tiny_recipe: Path, tmp_path: Path) -> None:
    on = profile(environment={"NCCL_DEBUG": "INFO"}, network_interface="ib0", max_idle_requeues=7)
    made = prepare(tiny_recipe, "optimizer.lr=1e-2", on=on, num_nodes=3, command_line=["pomscale", "launch"])
    job_folder = tmp_path / "runs" / "tiny"
    variables = {"NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0"}
    assert made.spec == JobSpec(
        job_folder=str(job_folder),
        name="tiny",
        commands=[["train", str(job_folder / "launch" / "recipe.yaml")]],
        cwd=str(tmp_path),
        num_nodes=3,
        ranks_per_node=2,
        environment=variables,
        max_idle_requeues=7,
        is_run=True,
    )
    assert isinstance(made.recipe, TrainRecipe)
    assert made.recipe.optimizer.lr == 1e-2
    assert made.launched_as == LaunchedAs(
        "launch/recipe.yaml", "test", on.model_dump(mode="json"), 3, None, ["pomscale", "launch"]
    )
    assert ClusterProfile.model_validate(json.loads(json.dumps(made.launched_as.to_dict()))["profile"]) == on


def test_a_relative_output_lies_on_scratch_and_datasets_do_not(
    tiny_recipe: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    (tmp_path / "data").symlink_to(digits)
    made = prepare(tiny_recipe, "output=out", "data.path=data/latents/train", on=profile(scratch="$SCRATCH/pom"))
    assert made.job_folder == Path("/scratch/me/pom/out/tiny")
    assert isinstance(made.recipe, TrainRecipe)
    assert (made.recipe.output, made.recipe.data.path) == ("/scratch/me/pom/out", "data/latents/train")
    assert prepare(tiny_recipe, on=profile(scratch="$SCRATCH")).job_folder == tmp_path / "runs" / "tiny"
    with pytest.raises(InputError, match=r"scratch: \$NOWHERE: this variable is not set here"):
        prepare(tiny_recipe, on=profile(scratch="$NOWHERE"))


def test_nodes_without_internet(tiny_recipe: Path) -> None:
    made = prepare(tiny_recipe, "monitoring.wandb.mode=online", on=profile(offline=True))
    assert isinstance(made.recipe, TrainRecipe)
    assert made.recipe.monitoring.wandb.mode == "offline"
    assert "pomscale runs sync" in made.notes[0]
    assert made.spec.environment["HF_HUB_OFFLINE"] == "1"
    assert prepare(tiny_recipe, "monitoring.wandb.mode=online").notes == ()
    with pytest.raises(InputError, match="dataset https://x/y: the nodes of this cluster have no internet"):
        prepare(tiny_recipe, "data.path=https://x/y", on=profile(offline=True))


def test_a_variable_of_wandb_that_the_recipe_overrules_is_noted(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert prepare(tiny_recipe, "monitoring.wandb.mode=online", on=profile(offline=True)).notes[1:] == ()
    on = profile(environment={"WANDB_MODE": "disabled"})
    (note,) = prepare(tiny_recipe, "monitoring.wandb.mode=offline", on=on).notes
    assert note.startswith("WANDB_MODE is set, and not obeyed")


def test_an_encode_has_one_rank_and_one_gpu_per_task(digits: Path, tmp_path: Path) -> None:
    overrides = [f"source.path={digits}/digits/train", "output=data/latents"]
    path = RECIPES / "data" / "digits.yaml"
    made = prepare_encode(path, overrides, JobRequest(profile(**ON_GPUS, scratch="/scratch"), "test"), array=6)
    assert made.job_folder == Path("/scratch/runs/encode-digits")
    assert (made.spec.num_nodes, made.spec.ranks_per_node, made.gpus_per_node, made.array) == (1, 1, 1, 6)
    assert made.spec.commands == [["data", "encode", str(made.job_folder / "launch" / "recipe.yaml")]]
    assert not made.spec.is_run
    assert isinstance(made.recipe, EncodeRecipe)
    assert made.recipe.output == "data/latents"
    assert "--array=0-5%6" in made.script()
    assert "--gpus-per-node=1" in made.script()
    whole = prepare_encode(path, overrides, JobRequest(profile(**ON_GPUS), "test", gpus_per_node=4))
    assert (whole.spec.ranks_per_node, whole.gpus_per_node) == (4, 4)
    with pytest.raises(InputError, match=r"source\.path: nowhere: there is no such file or folder"):
        prepare_encode(path, ["source.path=nowhere"], JobRequest(profile(), "test"))
    to_come = {tmp_path / "nowhere"}
    prepare_encode(path, ["source.path=nowhere"], JobRequest(profile(), "test", to_come=to_come))


@pytest.mark.parametrize(
    ("limit", "asked", "line", "size"),
    [
        (None, 1000, "--array=0-999%1000", "1000 tasks of "),
        (300, 1000, "--array=0-999%300", "1000 tasks, at most 300 at once, of "),
        (300, 20, "--array=0-19%20", "20 tasks of "),
    ],
)
def test_all_tasks_of_an_array_may_run_at_once_unless_the_profile_says_otherwise(
    digits: Path, limit: int | None, asked: int, line: str, size: str
) -> None:
    """submitit would run 256 of them, and nobody is told."""
    overrides, on = [f"source.path={digits}/digits/train", "output=data/latents"], profile(max_array_tasks=limit)
    made = prepare_encode(RECIPES / "data" / "digits.yaml", overrides, JobRequest(on, "test"), array=asked)
    assert f"#SBATCH {line}\n" in made.script()
    assert made.tasks == size


@pytest.mark.parametrize(
    ("sbatch", "present", "absent"),
    [
        ({}, "--requeue", "--no-requeue"),
        ({"no-requeue": None}, "--no-requeue", "--requeue"),
        ({"no-kill-on-invalid-dep": "", "requeue": ""}, "--requeue", "--kill-on-invalid-dep=yes"),
    ],
)
def test_the_profile_has_the_last_word_on_what_sbatch_is_asked_for(
    tmp_path: Path, sbatch: dict[str, Any], present: str, absent: str
) -> None:
    made = prepare_commands("x", tmp_path / "x", [["data", "info", "x"]], JobRequest(profile(sbatch=sbatch), "test"))
    lines = made.script({"12": "ok"}).splitlines()
    assert f"#SBATCH {present}" in lines
    assert f"#SBATCH {absent}" not in lines


def test_commands(tmp_path: Path) -> None:
    words = [["data", "verify", "x"], ["data", "stats", "x"]]
    request = JobRequest(profile(**ON_GPUS), "test", gpus_per_node=0)
    made = prepare_commands("p-check", tmp_path / "p" / "check", words, request)
    assert (made.spec.commands, made.spec.ranks_per_node, made.recipe) == (words, 1, None)
    after = made.waiting_for({"/runs/before": "ok"})
    assert after.spec.wait_for == {"/runs/before": "ok"}
    assert "--dependency=afterok:12" in made.script({"12": "ok"})


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "how", "expected"),
    [
        (["data.path=nowhere"], {}, "dataset nowhere: there is no such folder; make it with `pomscale data encode"),
        (["model.num_classes=12"], {}, "has 10 classes, but model.num_classes is 12"),
        (["validation={path: nowhere, every_samples: 320}"], {}, "dataset nowhere: there is no such folder"),
        (["init_from={path: nowhere}"], {}, "init_from.path: nowhere: there is no such file or folder"),
        ([], {"num_nodes": 17}, "training.global_batch: 32 samples cannot be shared by 34 ranks"),
        (["fsdp2.shard_size=3"], {"num_nodes": 2}, "fsdp2.shard_size: 4 ranks do not make whole copies of 3"),
        (["compute.device=cuda"], {}, "compute.device: cuda, but this cluster profile gives no GPUs"),
        ([], {"time_limit": "20:00"}, "--time 20:00: give HOURS:MINUTES:SECONDS"),
        ([], {"time_limit": "0:03:00"}, "--time 0:03:00: not longer than the profile's signal_lead_s, 180 s"),
        ([], {"ranks_per_node": 9}, "ranks_per_node: 9 ranks, but a job gets 8 cores per node"),
        ([], {"gpus_per_node": 1}, "gpus_per_node: 1, but a node of this cluster has 0"),
        (["sweep={seed: [1, 2]}"], {}, "sweep: this recipe is several runs; start them all with `pomscale launch"),
    ],
)
def test_what_cannot_run_is_refused(tiny_recipe: Path, overrides: list[str], how: Any, expected: str) -> None:
    with pytest.raises(InputError) as refused:
        prepare(tiny_recipe, *overrides, **how)
    assert expected in str(refused.value)


def test_a_dry_run_has_the_script_and_all_that_would_refuse_it(tiny_recipe: Path) -> None:
    made = prepare(tiny_recipe, "data.path=nowhere", "compute.device=cuda", dry_run=True, num_nodes=2)
    assert "#SBATCH --nodes=2" in made.script()
    missing, no_gpus = made.refusals
    assert missing.startswith("dataset nowhere: there is no such folder; make it with `pomscale data encode")
    assert no_gpus.startswith("compute.device: cuda, but this cluster profile gives no GPUs")
    request = JobRequest(profile(), "test", dry_run=True)
    encode = prepare_encode(RECIPES / "data" / "digits.yaml", ["source.path=nowhere"], request, array=3)
    assert "--array=0-2%3" in encode.script()
    assert encode.refusals == ("source.path: nowhere: there is no such file or folder",)


def test_a_dry_run_that_would_be_refused_shows_the_script_and_fails(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    on = tmp_path / "test.yaml"
    on.write_text(yaml.safe_dump(BASE))
    with pytest.raises(InputError, match="this would be refused: dataset nowhere: there is no such folder"):
        launch(Launch(tiny_recipe, ["data.path=nowhere"], str(on), dry_run=True), lambda words: None)
    shown = capsys.readouterr().out
    assert "#SBATCH --job-name=tiny" in shown
    assert shown.endswith("nothing was written or submitted\n")
    sweep = ["data.path=nowhere", "sweep={seed: [1, 2]}"]
    with pytest.raises(InputError, match=r"this would be refused: tiny\.seed=1: dataset nowhere"):
        launch(Launch(tiny_recipe, sweep, str(on), dry_run=True), lambda words: None)
    assert "tiny.seed=2" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_with_what_would(tiny_recipe: Path, digits: Path) -> None:
    large = ["compute.device=auto", "model.dim=8192", "model.depth=48"]
    with pytest.raises(InputError, match=r"tiny: needs [\d.]+ GiB per GPU, and 71.2 GiB of an H100 are usable"):
        prepare(tiny_recipe, *large, on=profile(**ON_GPUS, gpu="h100"))
    with pytest.raises(InputError, match=r"compute\.float8: A100 has no float8"):
        prepare(tiny_recipe, "compute={device: auto, float8: true}", on=profile(**ON_GPUS, gpu="a100"))
    fits = prepare(tiny_recipe, "compute.device=auto", on=profile(**ON_GPUS, gpu="h100"))
    assert fits.plan[0].startswith("plan      tiny on 1 x 4 H100")
    assert fits.plan[-1].startswith("FITS")


def test_data_that_another_job_will_make_need_not_be_there(tiny_recipe: Path, tmp_path: Path) -> None:
    to_come = {tmp_path / "made", tmp_path / "runs" / "before"}
    overrides = ["data.path=made/train", "init_from={path: runs/before}"]
    assert prepare(tiny_recipe, *overrides, to_come=to_come).spec.name == "tiny"
    with pytest.raises(InputError, match="dataset made/train: there is no such folder"):
        prepare(tiny_recipe, *overrides)


@pytest.fixture
def begun(tiny_recipe: Path, tmp_path: Path) -> Path:
    """The folder of a run that has saved once, as far as a launch looks."""
    job_folder = tmp_path / "runs" / "tiny"
    recipe = load_train_recipe(tiny_recipe)
    write_checkpoint(job_folder, recipe, 320)
    (job_folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return job_folder


def write_checkpoint(job_folder: Path, recipe: TrainRecipe, samples: int) -> None:
    checkpoint = job_folder / "checkpoints" / f"samples-{samples:012d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    (checkpoint / "COMPLETE").write_text("")


def test_a_run_goes_on_with_its_own_recipe_only(tiny_recipe: Path, begun: Path) -> None:
    assert prepare(tiny_recipe, "optimizer.lr=1e-5", "training.total_samples=3200", num_nodes=2).job_folder == begun
    with pytest.raises(InputError) as refused:
        prepare(tiny_recipe, "seed=1", "model.depth=3", "codec.block=2")
    assert str(refused.value).startswith(f"{begun}: this run began with another recipe; choose another name, or undo: ")
    assert "seed: 0 then, 1 now; model.depth: " in str(refused.value)
    with pytest.raises(InputError, match="holds checkpoints, and resume is never"):
        prepare(tiny_recipe, "resume=never")


def test_before_the_first_checkpoint_it_is_the_recipe_that_was_launched(tiny_recipe: Path, tmp_path: Path) -> None:
    launched = tmp_path / "runs" / "tiny" / "launch" / "recipe.yaml"
    launched.parent.mkdir(parents=True)
    launched.write_text(dump_recipe(load_train_recipe(tiny_recipe)))
    assert prepare(tiny_recipe).spec.name == "tiny"
    with pytest.raises(InputError, match=r"delete it \(there is no checkpoint in it\), or undo: seed: 0 then, 1 now"):
        prepare(tiny_recipe, "seed=1")
    launched.write_text("kind: encode\noutput: x\n")
    with pytest.raises(InputError, match="undo: kind: encode"):
        prepare(tiny_recipe)


def test_a_run_that_has_finished_is_not_launched_again(tiny_recipe: Path, begun: Path) -> None:
    write_checkpoint(begun, load_train_recipe(tiny_recipe), 960)
    write_outcome(begun, 1, 0, "finished", samples=960)
    with pytest.raises(InputError, match="finished already, 960 samples; to continue, raise"):
        prepare(tiny_recipe)
    assert prepare(tiny_recipe, "training.total_samples=3200").job_folder == begun
    newest = max((begun / "checkpoints").iterdir())
    (newest / CHECKPOINT_META).write_text("[]")  # damaged, so training sets it aside and makes it again
    assert prepare(tiny_recipe).job_folder == begun


def test_a_run_that_is_at_work_is_left_alone(tiny_recipe: Path, begun: Path) -> None:
    """A local job, whose process lives: this one."""
    record_submission(begun, Submission(str(os.getpid()), 2e10, "local", 1))
    (begun / "job.json").write_text("{}")
    try:
        with pytest.raises(
            InputError, match=r"queued already.*`pomscale watch .*tiny`, or end it with `pomscale runs c"
        ):
            prepare(tiny_recipe)
        assert prepare(tiny_recipe, replacing=True).job_folder == begun
    finally:
        (begun / "job.json").unlink()


# --- submitting ------------------------------------------------------------------------------------------------------


def test_a_launch_that_fails_leaves_what_was_there_before(
    tiny_recipe: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin-without-slurm")
    before = sorted(begun.rglob("*"))
    with pytest.raises(PomscaleError):
        prepare(tiny_recipe, "name=other", "output=new/runs").submit()
    assert not Path("new").exists()
    with pytest.raises(PomscaleError):
        prepare(tiny_recipe).submit()
    assert sorted(begun.rglob("*")) == before


def test_several_nodes_need_a_scheduler(tiny_recipe: Path) -> None:
    on_one_machine = profile(scheduler="local", time_limit=None)
    with pytest.raises(InputError, match="--nodes 2: a local job has one node, this machine"):
        prepare(tiny_recipe, on=on_one_machine, num_nodes=2).submit()
    assert not Path("runs").exists()


def test_launching_needs_neither_torch_nor_numpy(tiny_recipe: Path) -> None:
    words = ["launch", str(tiny_recipe), "--cluster", "h100", "--dry-run", "compute.device=auto"]
    command = [sys.executable, "-X", "importtime", "-m", "pomscale", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "#SBATCH --nodes=1" in done.stdout
    assert done.stdout.endswith("nothing was written or submitted\n")
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert "submitit" in imported
    assert imported.isdisjoint({"torch", "numpy", "wandb", "fsspec.implementations.http"})


def test_the_limit_of_an_evaluation_is_looked_at_before_the_run_is_submitted(tiny_recipe: Path) -> None:
    """Not days later, by the supervisor, which can only warn."""
    run = ["evaluate digits {checkpoint} --out {folder}/figures.json"]
    asked = json.dumps([{"name": "look", "every_samples": 100, "run": run, "time_limit": "0:02:00"}])
    with pytest.raises(InputError, match=r"evaluations: look: .*signal_lead_s"):
        prepare(tiny_recipe, f"evaluations={asked}")
    assert prepare(tiny_recipe, f"evaluations={asked}", on=profile(scheduler="local", time_limit=None)).spec.evaluations


# --- a job that is refused -------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_job_that_is_refused(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But what another launch has put beside it meanwhile, in a folder that neither of them has found there."""
    other = tmp_path / "runs" / "other" / "launch.json"

    def refuse(*arguments: Any, **more: Any) -> str:
        if beside:
            other.parent.mkdir()
            other.write_text("{}")
        raise InputError("sbatch refuses this job")

    monkeypatch.setattr(prepared_module, "submit", refuse)
    for beside in (False, True):
        with pytest.raises(InputError, match="refuses"):
            prepare(tiny_recipe, on=profile(scheduler="local", time_limit=None)).submit()
        assert not (tmp_path / "runs" / "tiny").exists()
        assert (tmp_path / "runs").exists() == beside
    assert other.read_text() == "{}"


def test_two_launches_at_once_make_one_job(tiny_recipe: Path) -> None:
    """Both were checked before either was submitted."""
    first, second = (prepare(tiny_recipe, on=profile(scheduler="local", time_limit=None)) for _ in range(2))
    with sole_launch(first.job_folder), pytest.raises(InputError, match="another launch is under way there"):
        second.submit()
    record_submission(first.job_folder, Submission("1", 0.0, "local", 1))
    with pytest.raises(InputError, match="another launch has just submitted it"):
        second.submit()
    assert len(read_submissions(first.job_folder)) == 1
