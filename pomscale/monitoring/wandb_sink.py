"""wandb as one more view of a run. It may fail at any time; the run and metrics.jsonl go on."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pomscale.config.schema import WandbConfig
from pomscale.errors import InputError
from pomscale.files import write_text

if TYPE_CHECKING:
    from wandb import Run

ID_FILE = "wandb_id.txt"
INIT_TIMEOUT_S = 30.0  # every rank of the job waits at the start while wandb's server does not answer

logger = logging.getLogger(__name__)


class WandbSink:
    """Logs into one wandb run per run folder, over any number of incarnations, with `samples` as the axis.

    The wandb id is drawn once and kept in RUN/wandb_id.txt. Files go to RUN/wandb. When the server is away at the
    start, the incarnation is recorded offline under the same id (`wandb sync` joins it later). A failure while
    logging is counted and reported once.

    Raises InputError for a set-up only the user can repair (no API key, unknown entity), before any work.
    """

    def __init__(self, run_folder: Path, config: WandbConfig, run_name: str, recipe_dump: dict[str, Any]) -> None:
        # Here and not above: with wandb disabled, and on every rank but 0, nobody pays its second of import.
        import wandb  # noqa: PLC0415

        self._image = wandb.Image
        self._failures: tuple[type[Exception], ...] = (wandb.Error, OSError)  # OSError: its service process is gone
        self._num_failed = 0
        run_id = _make_wandb_id(run_folder)

        def open_run(mode: Literal["online", "offline", "disabled"]) -> Run:
            return wandb.init(
                mode=mode,
                id=run_id,
                # Offline there is no server to resume from, and wandb warns; the same id does it at sync.
                resume="allow" if mode == "online" else None,
                dir=run_folder,
                name=run_name,
                project=config.project,
                entity=config.entity,
                group=config.group,
                tags=config.tags,
                config=recipe_dump,
                allow_val_change=True,
                # The launcher keeps stdout and stderr of every rank; wandb would wrap them once more. quiet: its
                # closing summary repeats the console's last lines.
                settings=wandb.Settings(console="off", quiet=True, init_timeout=INIT_TIMEOUT_S),
            )

        try:
            self._run = open_run(config.mode)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise InputError(
                f"wandb refuses to start: {error}. Log in, or set monitoring.wandb.mode to offline or disabled"
            ) from error
        except (wandb.Error, OSError) as error:
            if config.mode != "online":
                raise
            logger.warning("wandb's server is away (%s): recording offline; `wandb sync` will join it", error)
            wandb.teardown()  # the failed attempt still holds the id in wandb's service process
            self._run = open_run("offline")
        self._run.define_metric("samples")
        # A resumed run writes some samples again, and wandb's own step starts anew offline: samples are the axis.
        self._run.define_metric("*", step_metric="samples")

    def log(self, samples: int, metrics: dict[str, float | str]) -> None:
        self._guard(lambda: self._run.log({"samples": samples, **metrics}))

    def log_image(self, samples: int, name: str, png_path: Path) -> None:
        self._guard(lambda: self._run.log({"samples": samples, name: self._image(str(png_path))}))

    def close(self, failed: bool = False) -> None:
        self._guard(lambda: self._run.finish(exit_code=int(failed)))
        if self._num_failed:
            logger.warning("wandb missed %d calls; metrics.jsonl has every row", self._num_failed)

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except self._failures as error:
            self._num_failed += 1
            if self._num_failed == 1:
                logger.warning("wandb fails (%r): rows are missing there; metrics.jsonl has every row", error)


def read_wandb_id(run_folder: Path) -> str | None:
    """The wandb run of this folder; None if it has none."""
    path = run_folder / ID_FILE
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def _make_wandb_id(run_folder: Path) -> str:
    """The wandb run of this folder, drawn at the first call."""
    found = read_wandb_id(run_folder)
    if found is None:
        found = secrets.token_hex(8)
        write_text(run_folder / ID_FILE, found + "\n")
    return found
