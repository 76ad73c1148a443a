"""The wandb run of a run folder: its id, the lock of the process that writes into it, and opening it."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from pomscale.base.errors import InputError
from pomscale.base.names import shortened
from pomscale.config.monitoring import WandbConfig
from pomscale.runs.layout import (
    CODE_DIFF_FILE,
    CODE_FOLDER,
    CODE_STATE_FILE,
    RECIPE_FILE,
    WANDB_FOLDER,
    WANDB_LOCK_FILE,
)
from pomscale.runs.metric_names import EVALUATION_PREFIX
from pomscale.runs.wandb_id import WANDB_RUN_DELETED, own_wandb_id, replace_wandb_id

if TYPE_CHECKING:
    from wandb import Run

INIT_TIMEOUT_S = 30.0  # while wandb's server does not answer, every rank of the job waits at the start

_FLUSH_EVERY_S = 1.0
_MAX_ARTIFACT_NAME = 128  # wandb refuses longer ones
_LOCK_TIMEOUT_S = 60.0  # a process that delivers an evaluation has ended by then
_NAME_EVERY_S = 1.1  # wandb names its folders by the second

# Values that are shown of a metric beside its curve, by the beginning of its name; of all others it is the last value.
_SUMMARIES = {
    "train/loss": "min,last",
    "validation/": "min,last",
    "speed/samples_per_s": "max,last",
    "memory/peak_gib": "max",
    EVALUATION_PREFIX: "min,max,last",
}

logger = logging.getLogger(__name__)


class WandbRun:
    """Opener of the one wandb run of a run folder, which may be opened many times.

    The wandb id is kept in RUN/wandb_id.txt, see runs.wandb_id. All files go to RUN/wandb, also those that wandb would
    stage in the user's home directory: a run folder has all that `wandb sync` needs.
    """

    def __init__(
        self,
        run_folder: Path,
        config: WandbConfig,
        run_name: str,
        recipe_dump: dict[str, Any],
        lock: WandbLock | None = None,
    ) -> None:
        """Prepare to open the wandb run, without opening it. `lock` is held already; None = `open` waits for it."""
        os.environ.setdefault("WANDB_DATA_DIR", str(run_folder / WANDB_FOLDER))
        # Imported here, which takes half a second, and so not with wandb disabled, nor on any rank but 0.
        import wandb  # noqa: PLC0415

        self.wandb = wandb
        self._folder = run_folder
        self._config = config
        self._run_name = run_name
        self._recipe_dump = recipe_dump
        self._lock = lock or WandbLock(run_folder)
        self._id = own_wandb_id(run_folder)
        self._opened_s = float("-inf")
        self._defined: set[str] = set()  # metrics of the wandb run that is open

    def open(self) -> Run:
        """Open the wandb run; offline under the same id while the server is away, for `wandb sync` to join it later.

        Raises InputError for a set-up that only the user can repair (no API key, unknown entity), and any other error
        that wandb raises.
        """
        self._lock.take(_LOCK_TIMEOUT_S)
        self._wait_for_another_name()
        self._opened_s = time.monotonic()
        self._id = own_wandb_id(self._folder)  # the process that had the lock before may have drawn another
        run = self._begin()
        run.define_metric("samples", summary="max")
        self._defined = {"samples"}
        return run

    def log(self, run: Run, row: Mapping[str, Any]) -> None:
        """Log a row, with "samples" in it, into the wandb run that is open.

        Samples are the axis: a resumed run logs some samples again, and offline wandb's own step begins at 0 again.
        Each metric is defined by its whole name, once: where two patterns match a name, wandb takes either, by chance.
        """
        for name in row.keys() - self._defined - {"_timestamp"}:
            self._defined.add(name)
            if "*" in name:  # wandb takes it for a pattern only; its axis is then wandb's own step
                continue
            whole_name = name.replace(".", r"\.")  # else a path into nested dictionaries
            run.define_metric(whole_name, step_metric="samples", summary=_summary(name, row[name]))
        run.log(dict(row))

    def _begin(self, *, again: bool = False) -> Run:
        """Begin the wandb run, `again` under another id."""
        try:
            return self._init(self._config.mode)
        except (self.wandb.errors.UsageError, self.wandb.errors.AuthenticationError) as error:
            raise InputError(
                f"wandb refuses to start: {error}. Log in, or set monitoring.wandb.mode to offline or disabled"
            ) from error
        except (self.wandb.Error, OSError) as error:
            if self._config.mode != "online":
                raise
            self.wandb.teardown()  # the failed attempt still holds the id in wandb's service process
            if WANDB_RUN_DELETED in str(error) and not again:
                self._id = replace_wandb_id(self._folder, "it was deleted on wandb's server")
                return self._begin(again=True)
            logger.warning(
                "wandb's server is away or refuses the run (%s): recording offline; `pomscale runs sync` will add it",
                error,
            )
            return self._init("offline")

    def _init(self, mode: Literal["online", "offline", "disabled"]) -> Run:
        config, settings = self._config, self.wandb.Settings
        flush = (
            "x_transaction_log_flush_interval"  # not in every version; the default of 15 s is what a kill would cost
        )
        return self.wandb.init(
            mode=mode,
            id=self._id,
            # Offline there is no server to resume from, and wandb warns; the same id joins them at sync.
            resume="allow" if mode == "online" else None,
            dir=self._folder,
            name=self._run_name,
            project=config.project,
            entity=config.entity,
            group=config.group or self._run_name,
            tags=config.tags,
            config=self._recipe_dump,
            allow_val_change=True,
            # The launcher keeps stdout and stderr of every rank; wandb would wrap them once more. quiet: its closing
            # summary repeats the console's last lines.
            settings=settings(
                console="off",
                quiet=True,
                init_timeout=INIT_TIMEOUT_S,
                **({flush: _FLUSH_EVERY_S} if flush in settings.model_fields else {}),
            ),
        )

    def log_files(self, run: Run) -> None:
        """Recipe and code as artifacts. wandb copies them, but for RUN/code, which stays as it was launched."""
        name = re.sub(r"[^A-Za-z0-9._-]", "-", self._run_name)
        for kind, files in (("recipe", [RECIPE_FILE]), ("code", [CODE_STATE_FILE, CODE_DIFF_FILE])):
            artifact = self.wandb.Artifact(shortened(f"{kind}-{name}", _MAX_ARTIFACT_NAME), type=kind)
            for file in files:
                if (self._folder / file).is_file():
                    artifact.add_file(str(self._folder / file), name=file)
            if kind == "code":
                for path in sorted((self._folder / CODE_FOLDER).rglob("*.py")):
                    artifact.add_file(str(path), name=str(path.relative_to(self._folder)), policy="immutable")
            if artifact.manifest.entries:
                run.log_artifact(artifact)

    def close(self) -> None:
        """Release the lock, so that another process may open the wandb run."""
        self._wait_for_another_name()
        self._lock.release()

    def _wait_for_another_name(self) -> None:
        time.sleep(max(0.0, self._opened_s + _NAME_EVERY_S - time.monotonic()))


class WandbLock:
    """RUN/wandb.lock, held by the process that writes into the run's wandb run: by training from its first row on.

    So a process that delivers an evaluation knows whether training is alive, and two of them do not write at once. The
    kernel releases the lock of a process that dies. The lock holds across nodes where the file system's locks do: NFS,
    GPFS, and Lustre mounted with `flock`.
    """

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / WANDB_LOCK_FILE
        self._file: BinaryIO | None = None

    def take(self, timeout_s: float = 0.0) -> bool:
        """Take the lock, and return whether it is held; False also where the file system has no locks or no room."""
        deadline_s = time.monotonic() + timeout_s
        while self._file is None:
            try:
                file = self._path.open("ab")
            except OSError:
                return False
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                if time.monotonic() >= deadline_s:
                    return False
                time.sleep(0.1)
            except OSError:
                file.close()
                return False
            else:
                self._file = file
        return True

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _summary(name: str, value: object) -> str | None:
    """Return the values that wandb shows of a metric, in its words; None = the last one."""
    if not isinstance(value, (int, float)):
        return None
    return next((summary for beginning, summary in _SUMMARIES.items() if name.startswith(beginning)), None)
