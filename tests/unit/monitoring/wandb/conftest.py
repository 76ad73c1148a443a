"""A run folder, and a wandb of its own with patience for each test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import wandb

from pomscale.monitoring import monitor as monitor_module
from pomscale.monitoring.wandb import run as wandb_run
from pomscale.monitoring.wandb import sink as wandb_sink
from support.wandb_folder import RECIPE


@pytest.fixture(autouse=True)
def own_wandb() -> Iterator[None]:
    """A service process of its own for every test: some kill it."""
    yield
    with suppress(ConnectionError):  # it was killed
        wandb.teardown()


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """On a busy machine wandb's process takes many seconds to start and to end, which is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (monitor_module, wandb_sink):
            patch.setattr(module, "CLOSE_TIMEOUT_S", 120.0)
        patch.setattr(wandb_run, "INIT_TIMEOUT_S", 90.0)
        patch.setenv("WANDB__SERVICE_WAIT", "90")
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder
