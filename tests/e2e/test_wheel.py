"""A wheel, installed into an environment without the checkout, has everything that the commands need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.slow

SOURCES = ["pomscale", "launch", "data_pipelines", "recipes", "slurm", "pyproject.toml", "README.md", "LICENSE"]
Command = Callable[..., str]


def call(command: list[str], cwd: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """From a copy: setuptools leaves its build folder beside the sources, and takes along what it finds in one."""
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    call([sys.executable, "-m", "pip", "wheel", *options, str(sources)], folder, dict(os.environ))
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """(bin/ of an environment, variables): the wheel, and the packages of the environment that runs the tests."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    venv.create(folder / "venv", with_pip=False)
    binaries = folder / "venv" / "bin"
    # A path that a .pth file names is not searched for .pth files, so an editable pomscale stays behind.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    [site_packages] = (folder / "venv").glob("lib/python*/site-packages")
    (site_packages / "others.pth").write_text("\n".join(others))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    pip = [sys.executable, "-m", "pip", "--python", str(binaries / "python")]
    options = ["install", "--no-deps", "--ignore-installed", "--quiet"]
    call([*pip, *options, str(build_wheel(folder))], folder, environment)
    return binaries, environment


@pytest.fixture
def command(installed: tuple[Path, dict[str, str]], tmp_path: Path) -> Command:
    """Run a program of the environment in a folder outside of the checkout."""
    binaries, environment = installed
    return lambda program, *arguments: call([str(binaries / program), *arguments], tmp_path, environment)


def test_a_wheel_has_the_code_the_recipes_and_the_scripts(command: Command) -> None:
    asked = (
        "import pomscale, launch, data_pipelines; from pomscale.base.installation import *; "
        "from pomscale.runs.code_state import code_state; "
        "print(root(), recipes_folder(), slurm_folder(), launch.__file__, code_state()[0], sep=chr(10))"
    )
    root, recipes, slurm, launch, code = command("python", "-c", asked).splitlines()
    assert Path(recipes).is_relative_to(root)
    assert Path(launch).is_relative_to(root)
    assert not Path(root).is_relative_to(ROOT)
    assert "'git_commit': None" in code, "installed code is of no checkout"
    for shipped, original in ((Path(recipes), ROOT / "recipes"), (Path(slurm), ROOT / "slurm")):
        files = {path.relative_to(original): path.read_bytes() for path in original.rglob("*") if path.is_file()}
        assert {path.relative_to(shipped): path.read_bytes() for path in shipped.rglob("*") if path.is_file()} == files


def test_a_job_gets_a_copy_of_the_installed_code_with_its_recipes(command: Command, tmp_path: Path) -> None:
    command("python", "-c", "from pathlib import Path; from launch.submission.freeze import freeze; freeze(Path())")
    asked = (
        "import sys; sys.path.insert(0, 'code'); from pomscale.base.installation import *; "
        "print(root(), recipes_folder(), slurm_folder(), sep=chr(10))"
    )
    root, recipes, slurm = map(Path, command("python", "-c", asked).splitlines())
    assert root == tmp_path / "code"
    assert (recipes / "quickstart.yaml").is_file()
    assert (slurm / "requeue.sh").is_file()
    assert all(folder.is_relative_to(root) for folder in (recipes, slurm))


def test_commands_find_recipes_and_clusters_by_name(command: Command) -> None:
    assert command("pomscale", "config", "list").count("\n") == len(list((ROOT / "recipes").rglob("*.yaml")))
    assert "h100" in command("pomscale", "cluster", "list")
    plan = command("pomscale", "plan", "image/dipom-xl-2", "--nodes", "2", "--gpu", "h200")
    assert "dipom-xl-2 on 2 x 8 H200" in plan


def test_the_digits_are_encoded_and_trained_on(command: Command, tmp_path: Path) -> None:
    command("python", "-m", "data_pipelines.demos.digits", "data/digits")
    script = command("pomscale", "launch", "data/digits", "--cluster", "test", "--dry-run")
    assert "pomscale_end() {" in script, "requeue.sh is found"
    stages = command("pomscale", "launch", "pipelines/digits", "--cluster", "local", "--dry-run")
    assert "encode-heldout" in stages
    command("pomscale", "data", "encode", "data/digits")
    command("pomscale", "data", "encode", "data/digits-heldout")
    short = ["training.total_samples=640", "schedule={warmup_samples: 64, cooldown_samples: 64}", "model.depth=1"]
    command("pomscale", "train", "quickstart", *short, "sampling.every_samples=null")
    run = tmp_path / "runs" / "quickstart"
    assert '"finished"' in (run / "outcome.json").read_text()
    assert list((run / "checkpoints").glob("samples-*"))
