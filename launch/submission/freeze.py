"""The code that a job runs: a copy in its home, made when it is launched first.

    HOME/code/{pomscale,launch,data_pipelines,recipes,slurm}   what PYTHONPATH of the ranks points to
    HOME/code/code.json, code.diff                             git commit, and what differed from it

A job may wait in the queue for days and be started many times. Whoever edits the checkout meanwhile does not change it.
"""

from __future__ import annotations

import json
import os
import shutil
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from launch.record.job import CODE
from pomscale.base import installation
from pomscale.base.errors import InputError
from pomscale.base.files import make_folder, write_text
from pomscale.runs.code_state import code_state
from pomscale.runs.layout import CODE_DIFF_FILE, CODE_STATE_FILE

_NOT_CODE = shutil.ignore_patterns("__pycache__", "*.pyc")


def freeze(home: Path, *, new_code: bool = False) -> None:
    """Copy the code that is running into the home. What is there already stays, unless new_code.

    Whole or not at all. InputError if it cannot be copied.
    """
    code = home / CODE
    if code.exists() and not new_code:
        return
    make_folder(home)
    copy, old = (home / f"{CODE}.{word}-{os.getpid()}" for word in ("new", "old"))
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
    state, diff = _code_of_now()
    write_text(folder / CODE_STATE_FILE, json.dumps(state, indent=1))
    write_text(folder / CODE_DIFF_FILE, diff)


def which_code(home: Path, *, new_code: bool = False) -> str:
    """What a job that is launched in this home will run, for people."""
    state_file = home / CODE / CODE_STATE_FILE
    if not (home / CODE).exists():
        return f"of now, {_name(_code_of_now()[0])}"
    if new_code:
        return f"of now, {_name(_code_of_now()[0])}, instead of what it began with"
    if not state_file.is_file():
        return f"that in {home / CODE}"
    frozen = datetime.fromtimestamp(state_file.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    state = json.loads(state_file.read_text(encoding="utf-8"))
    return f"what it began with ({_name(state)}, copied {frozen}); --new-code takes that of now"


@cache
def _code_of_now() -> tuple[dict[str, Any], str]:
    """Asks git once: a sweep copies it for every run, and git takes its time on a large file system."""
    return code_state()


def _name(state: dict[str, Any]) -> str:
    commit = state["git_commit"]
    if commit is None:
        return f"pomscale {state['pomscale']}"
    return f"commit {str(commit)[:10]}{' with changes' if state['dirty'] else ''}"
