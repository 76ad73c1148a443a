"""Sink for wandb, which may fail at any time without harm to the run or to metrics.jsonl."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomscale.base.background import CLOSE_TIMEOUT_S, Background
from pomscale.base.errors import InputError
from pomscale.config.load import load_train_recipe
from pomscale.config.monitoring import WandbConfig
from pomscale.monitoring.sinks import Level
from pomscale.monitoring.wandb.run import WandbLock, WandbRun
from pomscale.runs.evaluation_log import VIDEOS, Delivery, Evaluation, read_evaluations
from pomscale.runs.layout import RECIPE_FILE, WANDB_ROOM_FILE
from pomscale.runs.metric_names import EVALUATION_PREFIX
from pomscale.runs.wandb_id import read_wandb_id

if TYPE_CHECKING:
    from wandb import Run

_MOST_WAITING = 4096
_RETRY_EVERY_S = 30.0
_LOOK_FOR_ROOM_EVERY_S = 5.0
_ROOM_BYTES = 256 * 1024
_UNSURE_S = 20.0  # wandb may not have written yet what it was given in this time: its default is to write every 15 s

logger = logging.getLogger(__name__)

_Call = Callable[["Run"], object]


class WandbSink:
    """Logs into one wandb run per run folder, over any number of starts, with `samples` as the axis.

    Beside rows, wandb gets the recipe and the code as artifacts, and the evaluations of evaluations.jsonl. While its
    server is away, wandb's own process keeps on disk what it is given. That process may die; on a full disk it lives,
    and silently drops everything. So it is given nothing while there is no room, and entries wait here. They are tried
    again, in a new process and a new folder of the same wandb run, together with the entries that the old process got
    in its last seconds: the same figures twice at the same samples do no harm. Entries that are lost are counted.
    """

    name = "wandb"
    if_cut_off = "what was not sent is in RUN/wandb: send it with `pomscale runs sync` or `wandb sync`"

    def __init__(
        self,
        run_folder: Path,
        config: WandbConfig,
        run_name: str,
        recipe_dump: dict[str, Any],
        lock: WandbLock | None = None,
    ) -> None:
        """Open wandb at once if it is online, else with the first row.

        Args:
            run_folder: the run folder.
            config: settings of the recipe.
            run_name: name of the wandb run.
            recipe_dump: the resolved recipe.
            lock: a lock that is held already, by a short session beside training; recipe and code are not logged then.

        Raises:
            InputError: a set-up that only the user can repair (no API key, unknown entity).
        """
        # Its process writes the record's end. Online it may wait for the server, which is not waited for.
        self.is_slow_to_close = config.mode != "online"
        self._folder = run_folder
        self._opening = WandbRun(run_folder, config, run_name, recipe_dump, lock)
        self._wandb = self._opening.wandb
        self._delivery = Delivery(run_folder)
        self._waiting: deque[_Call] = deque()
        self._given: deque[tuple[float, _Call]] = deque()  # in the last _UNSURE_S
        self._refused: _Call | None = None  # failed last
        self._tried_s = self._looked_for_room_s = float("-inf")
        self._has_room = False
        self._has_warned = False
        self._num_lost = 0
        self.num_delivered = 0  # evaluations
        self._has_files_to_give = lock is None
        self._run: Run | None = None
        if config.mode == "online":
            try:
                self._run = self._opening.open()
            except InputError:
                raise
            except Exception as error:  # noqa: BLE001 (wandb may raise anything)
                self._fail(error)

    def log(self, samples: int, metrics: dict[str, float | str], time_unix_s: float | None = None) -> None:
        row = self._row(samples, metrics, time_unix_s)
        self._give(lambda run: self._opening.log(run, row))

    def log_image(self, samples: int, name: str, path: Path) -> None:
        num_bytes, row = path.stat().st_size, self._row(samples, {name: self._medium(path)})

        def give(run: Run) -> None:
            if self._has_room_for(num_bytes):
                self._opening.log(run, row)
            else:
                self._num_lost += 1
                logger.warning("%s: no room for wandb's copy of it", path)

        self._give(give)

    log_video = log_image

    def alert(self, samples: int, title: str, text: str, level: Level) -> None:
        self._give(lambda run: run.alert(title, text, level=level))

    def close(self, failed: bool = False) -> None:
        for _ in range(2):  # if wandb has died meanwhile, once more
            self._tried_s = float("-inf")
            self._hand_over()
            if self._run is None:
                break
            try:
                self._run.finish(exit_code=int(failed))
                self._wandb.teardown()  # its process writes the last rows after `finish` has returned
            except Exception as error:  # noqa: BLE001 (wandb may raise anything)
                self._fail(error)
            else:
                break
        self._num_lost += len(self._waiting)
        if self._num_lost:
            logger.warning("wandb missed %d entries; metrics.jsonl has every row", self._num_lost)
        self._opening.close()

    def _row(self, samples: int, content: Mapping[str, Any], time_unix_s: float | None = None) -> dict[str, Any]:
        return {"samples": samples, "_timestamp": time.time() if time_unix_s is None else time_unix_s, **content}

    def _medium(self, path: Path) -> Any:
        if path.suffix.lower() in VIDEOS:
            return self._wandb.Video(str(path), format=path.suffix[1:].lower())
        return self._wandb.Image(str(path))

    def _give(self, call: _Call) -> None:
        self._wait_with(call)
        self._hand_over()

    def _wait_with(self, call: _Call) -> None:
        if len(self._waiting) < _MOST_WAITING:
            self._waiting.append(call)
        else:
            self._num_lost += 1

    def _hand_over(self) -> None:
        """Hand over all that waits, as far as wandb takes it now."""
        try:
            self._look_for_room()
            if self._run is None:
                if time.monotonic() < self._tried_s + _RETRY_EVERY_S:
                    return
                self._tried_s = time.monotonic()
                self._run = self._opening.open()
            self._give_files(self._run)
            self._queue_evaluations()
            while self._waiting:
                call = self._waiting[0]
                self._hand(self._run, call)
                self._waiting.popleft()
                self._given.append((time.monotonic(), call))
        except Exception as error:  # noqa: BLE001 (wandb may raise anything)
            self._fail(error)

    def _give_files(self, run: Run) -> None:
        """Give recipe and code once, even if that fails: the run folder has them."""
        if not self._has_files_to_give:
            return
        self._has_files_to_give = False
        try:
            self._opening.log_files(run)
        except Exception as error:  # noqa: BLE001 (wandb may raise anything)
            logger.warning("wandb did not take code and recipe: %r", error)

    def _hand(self, run: Run, call: _Call) -> None:
        try:
            call(run)
        except Exception:
            if self._refused is call:  # refused by a new wandb as well: it must not hold up later entries
                self._waiting.popleft()
                self._num_lost += 1
            self._refused = call
            raise

    def _look_for_room(self) -> None:
        """Check that there is room for rows. Raises OSError where the disk or a quota is full."""
        now_s = time.monotonic()
        while self._given and self._given[0][0] < now_s - _UNSURE_S:
            self._given.popleft()
        if self._has_room and now_s < self._looked_for_room_s + _LOOK_FOR_ROOM_EVERY_S:
            return
        self._has_room = False
        self._probe(_ROOM_BYTES)
        self._has_room, self._looked_for_room_s = True, now_s

    def _has_room_for(self, num_bytes: int) -> bool:
        """Whether there is room for a copy and for rows after it: a copy that breaks off would keep the disk full."""
        try:
            self._probe(num_bytes + _ROOM_BYTES)
        except OSError:
            return False
        return True

    def _probe(self, num_bytes: int) -> None:
        """Write and delete so many bytes, the only test that knows quotas. Raises OSError where there is no room."""
        probe = self._folder / WANDB_ROOM_FILE
        probe.parent.mkdir(exist_ok=True)
        try:
            with probe.open("wb") as file:
                for _ in range(-(-num_bytes // _ROOM_BYTES)):
                    file.write(bytes(_ROOM_BYTES))
        finally:
            probe.unlink(missing_ok=True)

    def _fail(self, error: Exception) -> None:
        """Give up the present wandb, which has died or could not write, and queue its latest entries again."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning("wandb fails (%r): rows wait and are tried again; metrics.jsonl has every row", error)
        if self._run is None:
            return
        self._waiting.extendleft(call for _, call in reversed(self._given))
        self._given.clear()
        run, self._run = self._run, None
        # Its remains may hold the id, and may be broken in any way.
        with suppress(Exception):
            run.finish()
        with suppress(Exception):
            self._wandb.teardown()

    def _queue_evaluations(self) -> None:
        num_waiting = len(self._waiting)
        for evaluation, position in self._delivery.due():
            self._wait_with(partial(self._give_evaluation, evaluation, position))
        if len(self._waiting) > num_waiting:
            self._wait_with(self._give_table)

    def _give_evaluation(self, evaluation: Evaluation, position: int, run: Run) -> None:
        media, num_bytes = {}, 0
        for name, path in evaluation.pictures.items():
            # A file that was deleted since, is broken or has no room does not hold back the figures.
            try:
                medium, size = self._medium(path), path.stat().st_size
            except Exception as error:  # noqa: BLE001 (wandb may raise anything)
                logger.warning("%s: wandb does not take it (%r)", path, error)
                continue
            if self._has_room_for(num_bytes + size):
                media[name] = medium
                num_bytes += size
            else:
                logger.warning("%s: no room for wandb's copy of it", path)
        row = self._row(evaluation.samples, {**evaluation.metrics, **media}, evaluation.time_unix_s)
        self._opening.log(run, row)
        if evaluation.settings:
            settings = {f"{EVALUATION_PREFIX}{curve}": evaluation.settings for curve in evaluation.curves}
            run.config.update(settings, allow_val_change=True)
        self.num_delivered += 1
        self._delivery.note(position)

    def _give_table(self, run: Run) -> None:
        columns, rows = _table(read_evaluations(self._folder))
        table = self._wandb.Table(columns=columns, data=rows)
        self._opening.log(run, {"samples": rows[-1][0], f"{EVALUATION_PREFIX}table": table})


def _table(evaluations: list[Evaluation]) -> tuple[list[str], list[list[float | None]]]:
    """Return the columns, and one row per checkpoint of its samples and figures; the last of a figure counts."""
    found: dict[int, dict[str, float]] = {}
    for evaluation in evaluations:
        found.setdefault(evaluation.samples, {}).update(evaluation.metrics)
    names = sorted({name for figures in found.values() for name in figures})
    rows = [[samples, *(figures.get(name) for name in names)] for samples, figures in sorted(found.items())]
    return ["samples", *(name.removeprefix(EVALUATION_PREFIX) for name in names)], rows


def deliver_without_training(run_folder: Path) -> int:
    """Give evaluations to the run's wandb run in a short session of its own, and return how many it took.

    Returns 0 while training is alive, which gives them with its next row, and where the run has no wandb run or has
    them already. Evaluations that wandb does not take are left for the next delivery. Raises InputError if the run's
    recipe cannot be read.
    """
    recipe = load_train_recipe(run_folder / RECIPE_FILE)
    config, lock = recipe.monitoring.wandb, WandbLock(run_folder)
    if config.mode == "disabled" or read_wandb_id(run_folder) is None or not Delivery(run_folder).has_more:
        return 0
    if not lock.take():
        return 0
    try:
        sink = WandbSink(run_folder, config, recipe.name, recipe.model_dump(mode="json"), lock)
    except InputError as error:
        lock.release()
        logger.warning("%s; the evaluation is in evaluations.jsonl, and not in wandb", error)
        return 0
    session = Background(sink.name)
    session.finish(sink.close)
    if not session.join(time.monotonic() + CLOSE_TIMEOUT_S):
        logger.warning("wandb has not ended within %g s: %s", CLOSE_TIMEOUT_S, sink.if_cut_off)
    return sink.num_delivered
