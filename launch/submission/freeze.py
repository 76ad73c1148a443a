"""Frozen code: a copy in the job folder of the code that a job runs, made when the job is launched first.

    JOB_FOLDER/code/{pomscale,launch,data_pipelines,recipes,slurm}   PYTHONPATH of the ranks points to JOB_FOLDER/code
    JOB_FOLDER/code/code.json, code.diff                             git commit, and the differences from it

A job may wait in the queue for days and be started many times. Edits of the checkout meanwhile do not change it.
"""

from __future__ import annotations

import json
import os
import shutil
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from pomscale.base import installation
from pomscale.base.errors import InputError
from pomscale.base.files import make_folder, write_text
from pomscale.runs.code_state import code_state
from pomscale.runs.layout import CODE_DIFF_FILE, CODE_FOLDER, CODE_STATE_FILE

_NOT_CODE = shutil.ignore_patterns("__pycache__", "*.pyc")


def freeze(job_folder: Path, *, new_code: bool = False) -> None:
    """Copy the code that is running into the job folder, completely or not at all.

    A copy that exists already stays, unless new_code is set. InputError if the code cannot be copied.
    """
    code = job_folder / CODE_FOLDER
    if code.exists() and not new_code:
        return
    make_folder(job_folder)
    copy, old = (job_folder / f"{CODE_FOLDER}.{word}-{os.getpid()}" for word in ("new", "old"))
    try:
        _copy_to(copy)
        if code.exists():
            code.rename(old)
        copy.rename(code)
    except OSError as error:  # shutil.Error, too
        if old.exists() and not code.exists():
            old.rename(code)
        raise InputError(f"{code}: the code cannot be copied there: {error}; make room and launch again") from error
    finally:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _copy_to(folder: Path) -> None:
    packages = [installation.root() / name for name in installation.CODE_PACKAGES]
    for source in (*packages, installation.recipes_folder(), installation.slurm_folder()):
        if source.parent == installation.root():  # in a wheel, recipes and scripts are part of pomscale
            shutil.copytree(source, folder / source.name, ignore=_NOT_CODE)
    state, diff = _running_code()
    write_text(folder / CODE_STATE_FILE, json.dumps(state, indent=1))
    write_text(folder / CODE_DIFF_FILE, diff)


def which_code(job_folder: Path, *, new_code: bool = False) -> str:
    """Describe, for the user, the code that a job will run when it is launched in this job folder."""
    state_file = job_folder / CODE_FOLDER / CODE_STATE_FILE
    if not (job_folder / CODE_FOLDER).exists():
        return f"this checkout, {_name(_running_code()[0])}"
    if new_code:
        return f"this checkout, {_name(_running_code()[0])}, in place of its frozen copy"
    if not state_file.is_file():
        return f"the copy in {job_folder / CODE_FOLDER}"
    frozen = datetime.fromtimestamp(state_file.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    state = json.loads(state_file.read_text(encoding="utf-8"))
    return f"its frozen copy ({_name(state)}, copied {frozen}); --new-code replaces it by this checkout"


@cache
def _running_code() -> tuple[dict[str, Any], str]:
    """Ask git once: a sweep needs the answer for every run, and git is slow on a large file system."""
    return code_state()


def _name(state: dict[str, Any]) -> str:
    commit = state["git_commit"]
    if commit is None:
        return f"pomscale {state['pomscale']}"
    return f"commit {str(commit)[:10]}{' with changes' if state['dirty'] else ''}"
