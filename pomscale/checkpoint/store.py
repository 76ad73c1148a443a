"""Checkpoints of one run, on disk.

    checkpoints/samples-000000012800/
        __0_0.distcp ...   shards of model, optimiser and EMA (torch.distributed.checkpoint), by parameter name
        .metadata          each tensor's position; written after all shards
        checkpoint.json    clock, recipe, data fingerprint, codec and normalisation, versions
        checksums.json     length and CRC-32 of each of these files (runs.integrity)
        COMPLETE           the marker, written last, after everything else has reached the disk

A folder without the marker is never loaded (runs.checkpoint_folder). Every name and shape in a checkpoint is global,
so it loads on any number of ranks.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial as bind
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pomscale.base.console import warn
from pomscale.base.errors import InputError, PomscaleError
from pomscale.checkpoint.agreement import on_all_ranks, on_main_rank
from pomscale.checkpoint.retention import expendable, read_judged, write_judged
from pomscale.checkpoint.staging import CopyPlanner, HostCopy, leaves
from pomscale.checkpoint.summed_writer import SummedWriter
from pomscale.config.engine import CheckpointConfig
from pomscale.runs.checkpoint_folder import (
    begin,
    commit,
    complete_checkpoints,
    final_folder,
    incomplete_checkpoints,
    is_complete,
    partial_folder,
    remains,
    remove,
    samples_of,
    set_aside,
)
from pomscale.runs.integrity import Checksum, find_damage, find_damage_of, seal
from pomscale.runs.layout import CHECKPOINT_META, CHECKPOINTS_FOLDER, MARKER
from pomscale.runs.starts import Start, Superseded

# A rank that is gone breaks the connection; whether one that is slow hangs is for the watchdog to decide.
_LONGEST_SAVE = timedelta(hours=6)


@dataclass(frozen=True)
class Saved:
    """A save that is complete, as this rank saw it.

    Attributes:
        samples: samples seen by the checkpoint.
        stall_s: seconds that training stood still.
        total_s: seconds from the call to the commit.
        num_bytes: bytes written by this rank.
    """

    samples: int
    stall_s: float
    total_s: float
    num_bytes: int


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that is not what was written, its folder now, and the reason. It is never loaded."""

    folder: Path
    reason: str


class CheckpointStore:
    """Saves and loads the checkpoints below a folder. Every method but `poll` and `record_metrics` is a collective.

    `damaged` lists the damaged checkpoints that `newest` has found.
    """

    def __init__(self, root: Path, config: CheckpointConfig, start: Start | None) -> None:
        """Open the store.

        Args:
            root: folder of the checkpoints.
            config: what to keep, and whether to save in the background.
            start: this start of the run; None where no other process can write there.
        """
        self.root = root
        self.damaged: list[Damaged] = []
        self._config = config
        self._start = start
        self._number = 0 if start is None else start.number
        # A save runs beside training; in one group their collectives would mix.
        self._group = dist.new_group(backend="gloo", timeout=_LONGEST_SAVE)
        self._is_main = dist.get_rank() == 0
        self._host_copy = HostCopy()
        self._writer_thread = _start_thread()
        self._last_samples: int | None = None
        self._pending: _Pending | None = None
        self._saved: Saved | None = None

    # Saving

    def save(self, samples: int, state: dict[str, Any], meta: Mapping[str, Any]) -> float:
        """Begin to save, and return once the state may change again, with the seconds that training stood still.

        Args:
            samples: samples seen by the optimiser.
            state: tensors as from Engine.state_dict.
            meta: JSON content of checkpoint.json.

        Raises:
            PomscaleError: this save or the one before it failed, for instance on a full disk; earlier checkpoints stay
                as they are.
            Superseded: a newer start of the run has taken over; nothing is written.
        """
        start_s = time.perf_counter()
        self._finish()
        self._last_samples = samples
        if self._config.asynchronous:
            planner = CopyPlanner(self._host_copy.take(state))
            written = self._writer_thread.submit(self._write, samples, state, meta, planner)
            stall_s = time.perf_counter() - start_s
            self._pending = _Pending(samples, start_s, stall_s, written)
        else:
            num_bytes, end_s = self._write(samples, state, meta, dcp.DefaultSavePlanner())
            stall_s = end_s - start_s
            self._saved = Saved(samples, stall_s, stall_s, num_bytes)
        return stall_s

    def poll(self) -> Saved | None:
        """Return the save that has finished since the last call, or raise its error. Cheap; not a collective."""
        if self._pending is not None and self._pending.written.done():
            self._finish()
        saved, self._saved = self._saved, None
        return saved

    def wait(self) -> Saved | None:
        """Finish the save under way, if there is one, then do as `poll`."""
        self._finish()
        return self.poll()

    def _finish(self) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        num_bytes, end_s = pending.written.result()
        self._saved = Saved(pending.samples, pending.stall_s, end_s - pending.start_s, num_bytes)

    def _write(
        self, samples: int, state: dict[str, Any], meta: Mapping[str, Any], planner: dcp.SavePlanner
    ) -> tuple[int, float]:
        """Write a complete checkpoint, and return the bytes written by this rank and when it was complete."""
        folder = final_folder(self.root, samples)
        partial = partial_folder(folder, self._number)
        try:
            of_meta = on_main_rank(lambda: self._begin(folder, partial, meta), self._group)
            writer = SummedWriter(partial)
            dcp.save(state, storage_writer=writer, planner=planner, process_group=self._group)
            of_ranks = on_all_ranks(lambda: writer.checksums, self._group)
            on_main_rank(lambda: self._commit(folder, partial, [{CHECKPOINT_META: of_meta}, *of_ranks]), self._group)
        except Superseded:
            raise
        except (CheckpointException, PomscaleError, OSError, RuntimeError) as error:
            if self._is_main:
                self._check_start()  # a newer start may have deleted `partial`
                shutil.rmtree(partial, ignore_errors=True)  # half a checkpoint only takes up a full disk
            raise PomscaleError(_save_error(folder, error)) from error
        end_s = time.perf_counter()
        if self._is_main:
            self._prune()
        return sum(checksum.num_bytes for checksum in writer.checksums.values()), end_s

    def _begin(self, folder: Path, partial: Path, meta: Mapping[str, Any]) -> Checksum:
        self._check_start()
        if is_complete(folder):
            raise PomscaleError("it is complete already, and a checkpoint is never overwritten")
        _delete(remains(self.root, self._number))
        return begin(partial, meta)

    def _commit(self, folder: Path, partial: Path, checksums: Iterable[Mapping[str, Checksum]]) -> None:
        seal(partial, {name: checksum for part in checksums for name, checksum in part.items()})
        self._check_start()
        commit(partial, folder)

    def _prune(self) -> None:
        """Delete checkpoints that need not be kept. A failure costs room on the disk, not the run."""
        try:
            self._check_start()
            complete = {samples_of(folder): folder for folder in complete_checkpoints(self.root)}
            _delete([complete[n] for n in expendable(list(complete), read_judged(self.root), self._config)])
        except (PomscaleError, OSError) as problem:
            warn(str(problem))

    def _check_start(self) -> None:
        if self._start is not None:
            self._start.check()

    # Metrics of checkpoints

    def record_metrics(self, samples: int, metrics: Mapping[str, float | str]) -> None:
        """Record the best_metric of the checkpoint at `samples`, whose save may be under way. Not a collective."""
        value = metrics.get(self._config.best_metric)
        if not self._is_main or value is None:
            return
        known = {samples_of(folder) for folder in complete_checkpoints(self.root)} | {self._last_samples}
        try:
            self._check_start()
            write_judged(self.root, {**read_judged(self.root), samples: float(value)}, known)
        except PomscaleError as problem:
            warn(str(problem))

    # Loading

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint that is undamaged; every byte is read, shared by the ranks.

        Damaged ones are set aside, warned of and added to `damaged`. Raises PomscaleError if the save under way fails,
        or if a file that may be good cannot be read.
        """
        self._finish()
        while True:
            folder = on_main_rank(lambda: latest_checkpoint(self.root), self._group)
            reason = None if folder is None else self._find_damage(folder)
            if folder is None or reason is None:
                return folder
            self.damaged.append(on_main_rank(bind(self._set_aside, folder, reason), self._group))

    def check(self, folder: Path) -> None:
        """Raise InputError, naming the file, if this checkpoint is not what was written."""
        self._finish()
        _refuse_damaged(folder, self._find_damage(folder))

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Fill `state` in place from a checkpoint that `newest` returned or `check` has accepted.

        Raises InputError if the checkpoint has not all of its tensors in the same shapes; it may have more.
        """
        self._finish()
        on_main_rank(lambda: _check_fits(folder, state), self._group)
        try:
            dcp.load(state, storage_reader=dcp.FileSystemReader(folder), process_group=self._group)
        except CheckpointException as error:
            raise PomscaleError(f"{folder} could not be read ({_causes(error)}); run the same command again") from error

    def forget_after(self, samples: int) -> None:
        """Delete checkpoints beyond `samples`, since the run has gone back to before them."""
        self._finish()
        on_main_rank(lambda: self._forget_after(samples), self._group)

    def _forget_after(self, samples: int) -> None:
        self._check_start()
        _delete(folder for folder in complete_checkpoints(self.root) if samples_of(folder) > samples)

    def _find_damage(self, folder: Path) -> str | None:
        share = lambda: find_damage(folder, dist.get_rank(), dist.get_world_size())  # noqa: E731
        return next((reason for reason in on_all_ranks(share, self._group) if reason is not None), None)

    def _set_aside(self, folder: Path, reason: str) -> Damaged:
        self._check_start()
        aside = set_aside(folder)
        warn(
            f"{reason}. This checkpoint is DAMAGED and is not used; it is kept as {aside}. "
            "The run continues from the one before it: the training since then is lost. Check the disk."
        )
        return Damaged(aside, reason)


@dataclass(frozen=True)
class _Pending:
    samples: int
    start_s: float
    stall_s: float
    written: Future[tuple[int, float]]


def _start_thread() -> ThreadPoolExecutor:
    """Return an executor with one thread, so that saves follow each other in the same order on every rank."""
    if torch.cuda.is_initialized():  # otherwise a new thread uses the node's first GPU
        return ThreadPoolExecutor(1, "checkpoint", torch.cuda.set_device, (torch.cuda.current_device(),))
    return ThreadPoolExecutor(1, "checkpoint")


def latest_checkpoint(root: Path) -> Path | None:
    """Return the newest complete checkpoint, or None, without reading its content. Warns of incomplete ones."""
    complete = complete_checkpoints(root)
    for folder in incomplete_checkpoints(root):
        warn(f"{folder} has no {MARKER} marker and final name: it is being written, or was cut off; ignored")
    return complete[-1] if complete else None


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that `path` means: itself, or the newest of a run folder. Raises InputError if none."""
    if (path / CHECKPOINT_META).is_file():
        if not is_complete(path):
            raise InputError(f"{path}: this checkpoint has no {MARKER} marker: its save did not finish; use another")
        return path
    latest = latest_checkpoint(path / CHECKPOINTS_FOLDER)
    if latest is None and (inside := complete_checkpoints(path)):
        run = path.resolve().parent
        raise InputError(
            f"{path}: a folder of checkpoints; give one of them, such as {inside[-1]}, or the run itself, which stands "
            f"for its newest one: {run}"
        )
    if latest is None:
        raise InputError(f"{path}: no complete checkpoint here; give a run folder or a checkpoint folder")
    return latest


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the checkpoint.json of a complete checkpoint. Raises InputError if it is not what was written."""
    path = folder / CHECKPOINT_META
    _refuse_damaged(folder, find_damage_of(path))
    return json.loads(path.read_text(encoding="utf-8"))


def read_tensors(folder: Path, state: dict[str, Any], *, check: bool = True) -> None:
    """Fill `state` in place, in this process alone: for sampling and tools, outside of training.

    Raises InputError if any file of the checkpoint is damaged, or as CheckpointStore.load. With check False damage is
    not looked for, which reads every byte: for a caller that reads a checkpoint part by part and has checked it.
    """
    if check:
        _refuse_damaged(folder, find_damage(folder))
    _check_fits(folder, state)
    with warnings.catch_warnings():
        # dcp warns that it loads in a single process, which is what no_dist asks for
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)


def _refuse_damaged(folder: Path, reason: str | None) -> None:
    if reason is None:
        return
    others = [other for other in complete_checkpoints(folder.parent) if other.name != folder.name]
    remedy = f"use another one, e.g. {others[-1]}" if others else "there is no other one beside it"
    raise InputError(f"{reason}. The checkpoint {folder} is damaged and is not loaded; {remedy}")


def _check_fits(folder: Path, state: Mapping[str, Any]) -> None:
    """Raise InputError unless every tensor of `state` is in the checkpoint, in its shape."""
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    problems = []
    for name, tensor in leaves(state):
        there = saved.get(name)
        if not isinstance(there, TensorStorageMetadata):
            problems.append(f"{name} is not in it")
        elif there.size != tensor.shape:
            problems.append(f"{name} has shape {tuple(there.size)} in it, not {tuple(tensor.shape)}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InputError(f"{folder} is of another model, optimizer or ema: {'; '.join(problems[:3])}{more}")


def _delete(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            remove(folder)
        except OSError as error:  # a file held open on NFS, say: the run matters more than its garbage
            warn(f"{folder} could not be deleted ({error}) and takes up space")


def _causes(error: BaseException) -> str:
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(failures.items())) or str(error)


def _save_error(folder: Path, error: BaseException) -> str:
    existing = next(parent for parent in folder.parents if parent.exists())
    free_mib = shutil.disk_usage(existing).free / 2**20
    return (
        f"{folder}: the checkpoint could not be written; {free_mib:,.1f} MiB are free there ({_causes(error)}). "
        "Earlier checkpoints are intact: free some space or fix the file system, then run the same command again."
    )
