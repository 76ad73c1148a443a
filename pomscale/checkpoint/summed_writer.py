"""Writer of files for torch.distributed.checkpoint that computes a checksum of each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter, IOBase
from pathlib import Path
from typing import cast

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from pomscale.runs.integrity import Checksum, SummedFile


class SummedWriter(FileSystemWriter):
    """Writer of this rank's files into a new folder."""

    def __init__(self, folder: Path) -> None:
        # torch syncs .metadata before its buffer is flushed; a SummedFile is synced when it is closed.
        super().__init__(folder, sync_files=False, overwrite=False)
        self.fs = self._files = _SummedFiles()

    @property
    def checksums(self) -> dict[str, Checksum]:
        """Checksums by name of the files that this rank has written."""
        return self._files.checksums


class _SummedFiles(FileSystem):
    def __init__(self) -> None:
        self.checksums: dict[str, Checksum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IOBase]:
        assert mode == "wb"
        file = SummedFile(Path(path))
        try:
            with BufferedWriter(file) as stream:
                yield cast(IOBase, stream)
        except RuntimeError as error:
            raise file.problem or error from error
        self.checksums[Path(path).name] = file.checksum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)
