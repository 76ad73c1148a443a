"""Cluster profiles: those that are shipped, what is refused and how, and the job scripts that they lead to."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.record.job import JobSpec
from launch.submission.job_script import SubmitOptions, job_script
from pomscale.base.errors import InputError
from pomscale.config.cluster import minutes_of
from pomscale.config.load import load_cluster
from pomscale.config.shipped import known_clusters
from pomscale.config.yaml_file import RecipeError
from support.paths import RECIPES

Write = Callable[..., Path]

PROFILE = """\
kind: cluster
scheduler: slurm
gpus_per_node: 4
cpus_per_node: 32
time_limit: 2:00:00
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write PROFILE, or another text, with more lines."""

    def write_file(*lines: str, name: str = "mine.yaml", text: str = PROFILE) -> Path:
        path = tmp_path / name
        path.write_text(text + "".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write_file


def problems(path: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_cluster(path, list(overrides))
    return [problem.replace(f"{Path(path).parent}/", "") for problem in caught.value.problems]


# --- those that are shipped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", known_clusters())
def test_a_shipped_profile_is_valid_and_tells_what_it_is(name: str) -> None:
    assert load_cluster(name).description
    first, second = known_clusters()[name].read_text(encoding="utf-8").splitlines()[:2]
    schema = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert schema
    assert (known_clusters()[name].parent / schema[1]).resolve().name == "schema.json"
    assert second.startswith("# ")


def test_all_that_the_readme_names_are_there() -> None:
    wanted = {"h100", "a100", "h200", "jean-zay-h100", "jean-zay-a100", "test", "local", "debug"}
    assert set(known_clusters()) >= wanted


def test_jean_zay_is_as_its_documentation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDRPROJ", "abc")
    for name, gpus, cores in (("h100", 4, 24), ("a100", 8, 8)):
        options = script_options(
            job_script(spec(ranks_per_node=gpus), load_cluster(f"jean-zay-{name}"), SubmitOptions())
        )
        assert options["account"] == f"abc@{name}"
        assert options["constraint"] == name
        assert options["qos"] == f"qos_gpu_{name}-t3"
        assert options["hint"] == "nomultithread"
        assert (options["gpus-per-node"], options["ntasks-per-node"]) == (str(gpus), str(gpus))
        assert options["cpus-per-task"] == str(cores)
        assert options["time"] == "1200"
        assert not {"partition", "mem", "wckey"} & set(options)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_field_that_is_missing_is_named_with_the_file(write: Write) -> None:
    path = write(text=PROFILE.replace("cpus_per_node: 32\n", ""))
    assert problems(path) == ["mine.yaml:1: cpus_per_node: missing; set it here or in a base file"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("patrition: gpu", "patrition: unknown key; did you mean 'partition'?"),
        ("container: {kind: docker, image: x}", "container.kind: must be 'pyxis' or 'apptainer', got 'docker'"),
        ("signal_lead_s: 7200", "signal_lead_s: not shorter than time_limit, so a job would stop as soon as it starts"),
        ("ranks_per_node: 2", "ranks_per_node: a rank has one GPU; leave it out, or change gpus_per_node"),
        ("srun: [--export=NONE]", "srun: --export=NONE: the ranks need what the job script sets; write --export=ALL,"),
        ("srun: [--export, A=1]", "srun: --export=A=1: the ranks need what the job script sets; write --export=ALL,"),
    ],
)
def test_what_is_wrong_is_told_with_its_line_and_a_remedy(write: Write, line: str, expected: str) -> None:
    (problem,) = problems(write(line))
    assert re.fullmatch(rf"mine\.yaml:[16]: {re.escape(expected)}.*", problem)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("time_limit=null", "time_limit: missing; a SLURM job needs one"),
        ("time_limit='20:00'", "time_limit: string should match pattern"),
        ("gpus_per_node=0", "ranks_per_node: missing; it follows gpus_per_node only where there are GPUs"),
        ("cpus_per_node=3", "cpus_per_node: 3 cores are not enough for 4 ranks"),
        ("scheduler=local", "time_limit: means nothing without SLURM; leave it out, or set it to null"),
    ],
)
def test_values_that_contradict_each_other_are_named(write: Write, override: str, expected: str) -> None:
    assert any(f": {expected}" in problem for problem in problems(write(), override))


def test_an_unknown_name_lists_the_known_ones() -> None:
    (problem,) = problems("jean-zay-h10")
    assert problem.startswith("cluster 'jean-zay-h10': there is no such profile; did you mean 'jean-zay-h100'?; known")
    assert "a100, debug, h100" in problem
    assert problems("nowhere/mine.yaml") == ["mine.yaml: no such recipe file"]


def test_a_recipe_is_no_profile() -> None:
    recipe = RECIPES / "quickstart.yaml"
    assert problems(recipe) == [
        "quickstart.yaml:3: kind: this file is for `pomscale train`; here kind must be one of 'cluster'"
    ]


def test_a_variable_that_is_not_set_is_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IDRPROJ", raising=False)
    with pytest.raises(InputError, match=r"account: \$IDRPROJ@h100: this variable is not set here"):
        job_script(spec(), load_cluster("jean-zay-h100"), SubmitOptions())


def test_profiles_inherit_and_may_be_changed_in_passing(write: Write, tmp_path: Path) -> None:
    write()
    (tmp_path / "child.yaml").write_text("base: mine.yaml\npartition: gpu\nenvironment: {A: '1'}\n")
    profile = load_cluster(tmp_path / "child.yaml", ["environment.B='2'", "time_limit=1-02:00"])
    assert (profile.partition, profile.cpus_per_node) == ("gpu", 32)
    assert profile.environment == {"A": "1", "B": "2"}
    assert minutes_of(profile.time_limit or "") == 26 * 60


@pytest.mark.parametrize(
    ("limit", "minutes"), [("0:40:00", 40), ("20:00:00", 1200), ("0:00:01", 1), ("2-00:30", 2910), ("100:00:00", 6000)]
)
def test_time_limits_are_read_as_hours_and_rounded_up(write: Write, limit: str, minutes: int) -> None:
    """A time limit needs no quotes, although YAML 1.1 would make 72000 of 20:00:00."""
    path = write(f"time_limit: {limit}", text=PROFILE.replace("time_limit: 2:00:00\n", "signal_lead_s: 1\n"))
    if minutes == 1:
        assert minutes_of(limit) == 1
    else:
        assert minutes_of(load_cluster(path).time_limit or "") == minutes


# --- the job script --------------------------------------------------------------------------------------------------


def spec(**changes: Any) -> JobSpec:
    values: dict[str, Any] = {
        "job_folder": "/runs/a run",
        "name": "a-run",
        "commands": [["train", "x.yaml"]],
        "cwd": "/",
    }
    return JobSpec(**{**values, "ranks_per_node": 4, **changes})


def script_options(script: str) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --(.*)$", script, flags=re.MULTILINE)
    return {name: "".join(shlex.split(value)) for name, _, value in (line.partition("=") for line in lines)}


def srun_words(script: str) -> list[str]:
    (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
    return shlex.split(line)


def test_one_task_per_rank_or_one_per_node(write: Write) -> None:
    by_srun = script_options(job_script(spec(num_nodes=2), load_cluster(write()), SubmitOptions()))
    assert {name: by_srun[name] for name in ("nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node")} == {
        "nodes": "2",
        "ntasks-per-node": "4",
        "cpus-per-task": "8",
        "gpus-per-node": "4",
    }
    script = job_script(spec(num_nodes=2, ranks_by="torchrun"), load_cluster(write()), SubmitOptions())
    assert (script_options(script)["ntasks-per-node"], script_options(script)["cpus-per-task"]) == ("1", "32")
    assert "--cpus-per-task=32" in srun_words(script)


def test_what_a_run_needs_to_be_started_again(write: Write) -> None:
    script = job_script(spec(), load_cluster(write("signal_lead_s: 90")), SubmitOptions())
    options = script_options(script)
    assert options["signal"] == "USR2@90"
    assert options["requeue"] == ""
    assert options["open-mode"] == "append"
    assert options["output"] == "/runs/a run/submitit/%j_0_log.out"
    assert "--kill-on-bad-exit=1" in srun_words(script)


def test_the_ranks_get_what_the_script_has_set(write: Write) -> None:
    """Also where the site, the user's environment or the profile's `sbatch` says that jobs get nothing."""
    plain = srun_words(job_script(spec(), load_cluster(write("sbatch: {export: NONE}")), SubmitOptions()))
    assert [word for word in plain if word.startswith("--export")] == ["--export=ALL"]
    more = srun_words(job_script(spec(), load_cluster(write("srun: ['--export=ALL,A=1']")), SubmitOptions()))
    assert [word for word in more if word.startswith("--export")] == ["--export=ALL", "--export=ALL,A=1"]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["account: mine", "sbatch: {account: another}"], "sbatch.account: account says it already, 'mine'"),
        (["sbatch: {time: '10'}"], "sbatch.time: time_limit says it already"),
        (["sbatch: {array: 0-3}"], "sbatch.array: leave it out; `pomscale launch --array`"),
        (["sbatch: {nodes: '2'}"], "sbatch.nodes: leave it out; `pomscale launch --nodes`"),
    ],
)
def test_nothing_is_said_twice(write: Write, lines: list[str], told: str) -> None:
    """sbatch would take the profile's `sbatch`, silently: another account is charged, or a run becomes an array."""
    with pytest.raises(InputError, match=told):
        load_cluster(write(*lines))
    assert load_cluster(write("sbatch: {account: mine}")).sbatch == {"account": "mine"}


def test_some_of_the_gpus_bring_their_share_of_cores_and_memory(write: Write) -> None:
    profile = load_cluster(write("memory_gib: 480", "exclusive: true"))
    whole = script_options(job_script(spec(), profile, SubmitOptions()))
    one = script_options(job_script(spec(ranks_per_node=1), profile, SubmitOptions(gpus_per_node=1)))
    none = script_options(job_script(spec(ranks_per_node=1), profile, SubmitOptions(gpus_per_node=0)))
    assert (whole["mem"], whole["exclusive"]) == ("491520M", "")
    assert (one["gpus-per-node"], one["cpus-per-task"], one["mem"]) == ("1", "8", "122880M")
    assert "exclusive" not in one
    assert "gpus-per-node" not in none


def test_further_options_and_jobs_to_wait_for(write: Write) -> None:
    profile = load_cluster(write("partition: gpu", "wckey: ours", "sbatch: {comment: a b, overcommit: ''}"))
    options = SubmitOptions(time_limit="0:30:00", after={"7": "ok", "9": "any"}, array=6, exclude=["n1", "n2"])
    options = script_options(job_script(spec(), profile, options))
    assert (options["comment"], options["overcommit"], options["wckey"]) == ("a b", "", "ours")
    assert (options["time"], options["exclude"], options["array"]) == ("30", "n1,n2", "0-5%6")
    assert (options["dependency"], options["kill-on-invalid-dep"]) == ("afterok:7,afterany:9", "yes")
    assert options["output"].endswith("%A_%a_0_log.out")


def test_containers(write: Write) -> None:
    container = "container: {kind: %s, image: /images/pomscale, mounts: ['/a:/b', '/c'], options: [--writable]}"
    pyxis = srun_words(job_script(spec(), load_cluster(write(container % "pyxis")), SubmitOptions()))
    assert pyxis[7:10] == ["--container-image=/images/pomscale", "--container-mounts=/a:/b,/c", "--writable"]
    assert pyxis[10:12] == ["python", "-u"]
    profile = load_cluster(write(container % "apptainer"))
    apptainer = srun_words(job_script(spec(), profile, SubmitOptions()))
    words = ["apptainer", "exec", "--nv", "--bind", "/a:/b,/c", "--writable", "/images/pomscale", "python", "-u"]
    assert apptainer[7:16] == words
    assert "--nv" not in srun_words(job_script(spec(ranks_per_node=1), profile, SubmitOptions(gpus_per_node=0)))


def test_the_script_hands_the_environment_on(write: Write, tmp_path: Path) -> None:
    """The script itself, run by bash; only srun is one that writes down what it gets."""
    job_folder = tmp_path / "a run"
    (job_folder / "code").mkdir(parents=True)
    tools = tmp_path / "bin"
    tools.mkdir()
    shown = "import json, os, sys; json.dump([dict(os.environ), sys.argv[1:]], open(os.environ['GOT'], 'w'))"
    (tools / "srun").write_text(f'#!/bin/bash\nexec {sys.executable} -c {shlex.quote(shown)} "$@"\n')
    (tools / "srun").chmod(0o755)
    lines = ["modules: [arch/h100, cuda]", "setup: ['export FROM_SETUP=1']", "local_disk: $NODE_DISK/tmp"]
    script = job_script(
        spec(job_folder=str(job_folder), environment={"QUOTED": "it's $HOME", "NCCL_DEBUG": "INFO"}),
        load_cluster(write(*lines)),
        SubmitOptions(),
    )
    loaded = tmp_path / "loaded"
    module = f'module() {{ echo "$@" >> {shlex.quote(str(loaded))}; }}; export -f module\n'
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "NODE_DISK": "/disk",
        "GOT": str(tmp_path / "got"),
        "PYTHONPATH": "/before",
    }
    subprocess.run(["bash", "-c", module + script], env=environment, check=True, timeout=240)
    found, words = json.loads((tmp_path / "got").read_text())
    assert loaded.read_text().split("\n")[:3] == ["purge", "load arch/h100", "load cuda"]
    assert found["FROM_SETUP"] == "1"
    assert (found["QUOTED"], found["NCCL_DEBUG"]) == ("it's $HOME", "INFO")
    assert found["TMPDIR"] == "/disk/tmp"
    assert (found["PYTHONPATH"], found["PYTHONSAFEPATH"]) == (f"{job_folder}/code:/before", "1")
    assert words[-5:] == [sys.executable, "-u", "-m", "submitit.core._submit", f"{job_folder}/submitit"]
