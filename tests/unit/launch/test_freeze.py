"""The code that a run is launched with is the code it runs, whatever becomes of the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.submission.freeze import freeze, which_code
from pomscale.base.errors import InputError
from support.paths import ROOT


def test_the_copy_runs_and_says_where_it_comes_from(tmp_path: Path) -> None:
    freeze(tmp_path)
    code = tmp_path / "code"
    assert not list(code.rglob("__pycache__"))
    assert (code / "slurm" / "clusters" / "h100.yaml").is_file()
    state = json.loads((code / "code.json").read_text())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert (state["git_commit"] or "") == commit.strip()
    asked = (
        "import json, pomscale, launch, data_pipelines; from pomscale.runs.code_state import code_state; "
        "from pomscale.base.installation import recipes_folder, slurm_folder; "
        "folders = [str(recipes_folder()), str(slurm_folder())]; "
        "print(json.dumps([pomscale.__file__, launch.__file__, data_pipelines.__file__, *folders, *code_state()]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, env=environment, capture_output=True, check=True)
    *files, found_state, found_diff = json.loads(done.stdout)
    assert all(Path(file).is_relative_to(code) for file in files), "with its own recipes and scripts"
    assert (code / "recipes" / "quickstart.yaml").read_text() == (ROOT / "recipes" / "quickstart.yaml").read_text()
    assert found_state == state, "a frozen copy knows its commit without git"
    assert found_diff == (code / "code.diff").read_text()


def test_a_run_goes_on_with_its_code_unless_told_otherwise(tmp_path: Path) -> None:
    assert which_code(tmp_path).startswith("this checkout, ")
    freeze(tmp_path)
    marked = tmp_path / "code" / "pomscale" / "__init__.py"
    marked.write_text("# as it was\n")
    freeze(tmp_path)
    assert marked.read_text() == "# as it was\n"
    assert "its frozen copy (" in which_code(tmp_path)
    assert "--new-code replaces it by this checkout" in which_code(tmp_path)

    freeze(tmp_path, new_code=True)
    assert marked.read_text() == (ROOT / "pomscale" / "__init__.py").read_text()
    assert os.listdir(tmp_path) == ["code"]
    assert which_code(tmp_path, new_code=True).endswith(" in place of its frozen copy")


def test_new_code_that_cannot_take_its_place_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freeze(tmp_path)
    marked = tmp_path / "code" / "pomscale" / "__init__.py"
    marked.write_text("# as it was\n")
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if ".new-" in path.name:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(InputError, match="cannot be copied there"):
        freeze(tmp_path, new_code=True)
    assert marked.read_text() == "# as it was\n"
    assert os.listdir(tmp_path) == ["code"]


def test_code_that_cannot_be_copied_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        freeze(tmp_path / "file" / "run")
    assert os.listdir(tmp_path) == ["file"]
