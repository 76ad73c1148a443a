"""The checkpoints of one run, on disk.

    checkpoints/samples-000000012800/
        __0_0.distcp ...   shards of model, optimiser and EMA (torch.distributed.checkpoint), by parameter name
        .metadata          where every tensor lies; written after all shards
        checkpoint.json    clock, recipe, data fingerprint, codec and normalisation, versions
        COMPLETE           the marker, written last, after everything else has reached the disk

A folder without the marker is the remains of a save that was killed: it is never loaded. A folder is never
written to twice: a kill in the middle of an overwrite could leave the old .metadata over new, torn shards.
Every name and shape in a checkpoint is global, so it loads on any number of ranks.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from pomscale.errors import InputError, PomscaleError
from pomscale.files import sync_folder, write_text

MARKER = "COMPLETE"
META = "checkpoint.json"
_NAME = re.compile(r"samples-(\d{12})$")


class CheckpointStore:
    """Saves and loads the checkpoints below `root`. Every method is called by all ranks."""

    def __init__(self, root: Path, *, keep_last: int, asynchronous: bool) -> None:
        self.root = root
        self._keep_last = keep_last
        self._asynchronous = asynchronous
        self._is_main = dist.get_rank() == 0
        # Saving goes on while training does; on the training's own group their collectives would mix.
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[Path, Future[Any]] | None = None

    def save(self, samples: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Begin to save; returns when the state may change again. meta must be JSON-serialisable.

        Raises PomscaleError if this or the previous save failed, for instance on a full disk; earlier
        checkpoints stay as they are.
        """
        self.wait()
        folder = self.root / f"samples-{samples:012d}"
        if self._is_main:
            self._begin(folder, meta)
        dist.barrier(self._group)
        writer = dcp.FileSystemWriter(folder, sync_files=True, overwrite=False)
        if self._asynchronous:
            future = dcp.async_save(state, storage_writer=writer, process_group=self._group)
            assert isinstance(future, Future)
        else:
            future = Future()
            try:
                future.set_result(dcp.save(state, storage_writer=writer, process_group=self._group))
            except (CheckpointException, OSError) as error:
                future.set_exception(error)
        self._pending = (folder, future)

    def poll(self) -> None:
        """Commit a save that has finished; costs nothing otherwise. Not a collective."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Finish the save under way, if there is one, and delete what is older than the last `keep_last`."""
        if self._pending is None:
            return
        folder, future = self._pending
        self._pending = None
        try:
            future.result()
            if self._is_main:
                sync_folder(folder)
                write_text(folder / MARKER, "")
        except (CheckpointException, PomscaleError, OSError, RuntimeError) as error:
            message = _save_error(folder, error)
            if self._is_main:
                _remove(folder)  # on a full disk, half a checkpoint only takes room
            raise PomscaleError(message) from error
        if self._is_main:
            self._prune()

    def _begin(self, folder: Path, meta: dict[str, Any]) -> None:
        try:
            _remove(folder)  # remains of a killed save: it has no marker
            folder.mkdir(parents=True)
            write_text(folder / META, json.dumps(meta, indent=1))
        except (PomscaleError, OSError) as error:
            raise PomscaleError(_save_error(folder, error)) from error

    def _prune(self) -> None:
        """Delete what is older than the last `keep_last`, and the remains of saves that were killed before them."""
        complete = complete_checkpoints(self.root)
        keep = set(complete[-self._keep_last :])
        for folder in sorted(self.root.glob("samples-*")):
            if folder not in keep and folder < complete[-1]:
                try:
                    _remove(folder)
                except OSError as error:  # a file held open on NFS, say: the run matters more than its garbage
                    print(f"warning: {folder} could not be deleted ({error}) and takes up space", file=sys.stderr)

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Fill `state` (as from Engine.state_dict) in place from a complete checkpoint."""
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), process_group=self._group)


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints below `root`, oldest first."""
    folders = [p for p in root.glob("samples-*") if _NAME.match(p.name)]
    return sorted(p for p in folders if (p / MARKER).is_file())


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint, or None. Warns of folders without a marker, which are ignored."""
    complete = complete_checkpoints(root)
    for folder in sorted(set(root.glob("samples-*")) - set(complete)):
        print(f"warning: {folder} has no {MARKER} marker: its save did not finish; ignored", file=sys.stderr)
    return complete[-1] if complete else None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run folder. Raises InputError if none."""
    if (path / META).is_file():
        if not (path / MARKER).is_file():
            raise InputError(f"{path}: this checkpoint has no {MARKER} marker: its save did not finish; use another")
        return path
    latest = latest_checkpoint(path / "checkpoints")
    if latest is None:
        raise InputError(f"{path}: no complete checkpoint here; give a run folder or a checkpoint folder")
    return latest


def read_meta(folder: Path) -> dict[str, Any]:
    """The checkpoint.json of a complete checkpoint."""
    return json.loads((folder / META).read_text(encoding="utf-8"))


def read_tensors(folder: Path, state: dict[str, Any]) -> None:
    """Fill `state` in place, in this process alone: for sampling and tools, outside of training."""
    with warnings.catch_warnings():
        # dcp warns that it loads in a single process, which is what no_dist asks for
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)


def _remove(folder: Path) -> None:
    """Delete a checkpoint folder. The marker goes first: a kill in between leaves an ignored folder, not a torn one."""
    if folder.exists():
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _save_error(folder: Path, error: BaseException) -> str:
    failures = error.failures if isinstance(error, CheckpointException) else {}
    causes = [f"rank {rank}: {failure[0]}" for rank, failure in sorted(failures.items())] or [str(error)]
    # torch's writer may hide a full disk behind an error about file positions; the free space tells.
    existing = next(parent for parent in folder.parents if parent.exists())
    free_mib = shutil.disk_usage(existing).free / 2**20
    return (
        f"{folder}: the checkpoint could not be written; {free_mib:,.1f} MiB are free there ({'; '.join(causes)}). "
        "Earlier checkpoints are intact: free some space or fix the file system, then run the same command again."
    )
