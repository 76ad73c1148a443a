"""What tests of several rooms share: a real dataset of digits, a tiny recipe, and the real commands."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings

from support.digits import make_digits
from support.running import write_tiny_recipe

# Where the tests run in the background of a shell, Ctrl-C is ignored, also by all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# An example may take as long as it likes: a busy machine let some take longer than hypothesis's 200 ms. Without a
# deadline, its health check grants 30 s instead of 1 s for drawing the first ones.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, or the other workers would wait for it at the end."""
    items.sort(key=lambda item: "quickstart" not in item.name)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that make_digits fills."""
    root = tmp_path_factory.mktemp("digits")
    make_digits(root)
    return root


@pytest.fixture
def tiny_recipe(digits: Path, tmp_path: Path) -> Path:
    """A run of 50 steps that takes seconds; its run folder is tmp_path/runs/tiny."""
    return write_tiny_recipe(tmp_path, digits)
