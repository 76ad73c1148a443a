"""Fixtures that tests of several folders share: a working folder, a real dataset of digits, and a tiny recipe."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Without a GPU, Triton's kernels are interpreted on CPU tensors. Triton reads this where it is first imported, which
# the imports below do.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from support.dealing import dealt
from support.digits import make_digits
from support.forking import stop_server
from support.paths import ROOT
from support.running import write_tiny_recipe

# Modules and tests, some millions of objects, stay to the end: nobody looks for garbage while they are made, nor, after
# pytest_collection, among them. That is a third of the processor time that collecting tests takes.
gc.disable()

# Where the tests run in the background of a shell, Ctrl-C is ignored, also by all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# An example may take as long as it likes: a busy machine let some take longer than hypothesis's 200 ms. Without a
# deadline, its health check grants 30 s instead of 1 s for drawing the first ones.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.hookimpl(trylast=True)  # after those that are not wanted have been left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal the tests to the workers of pytest-xdist, the longest first."""
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if num_workers > 1:
        items[:] = dealt(items, num_workers)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect the tests, then look for garbage again, among what comes after."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def _left_by_commands() -> dict[str, list[str]]:
    """Return what lies in the folders of the checkout where commands put data, runs and logs by default."""
    folders = {name: ROOT / name for name in ("data", "runs", "wandb")}
    return {name: sorted(os.listdir(path)) for name, path in folders.items() if path.is_dir()}


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run all tests in an empty folder, and fail if anything has come there or to the checkout's data, runs or wandb.

    Tests neither see what a developer has in these folders nor leave anything behind.
    """
    before = _left_by_commands()
    folder = tmp_path_factory.mktemp("working-folder")
    os.chdir(folder)
    yield folder
    os.chdir(ROOT)
    stop_server()
    assert _left_by_commands() == before, "a test has written to the checkout"


@pytest.fixture(autouse=True)
def _nothing_left(_elsewhere: Path) -> Iterator[None]:
    """Fail a test that leaves files in the working folder, by a relative path or by the default of a command."""
    yield
    left = list(_elsewhere.iterdir())
    for path in left:  # or the tests after it would fail, too
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not left, "the test has written to the working folder; give it tmp_path"


@pytest.fixture(scope="session")
def digits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that make_digits fills, one for all workers of pytest-xdist."""
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # each worker has a folder of its own there
        shared = shared.parent
    root, made = shared / "digits", shared / "digits.made"
    with (shared / "digits.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not made.exists():
            make_digits(root)
            made.touch()
    return root


@pytest.fixture
def tiny_recipe(digits: Path, tmp_path: Path) -> Path:
    """A run of 30 steps that takes seconds; its run folder is tmp_path/runs/tiny."""
    return write_tiny_recipe(tmp_path, digits)
