"""Arrays of any length on disk: written front to back, memory-mapped for reading, and copied to be sorted."""

from __future__ import annotations

import math
import tempfile
from io import BufferedRandom
from pathlib import Path

import numpy as np

from pomscale.base.errors import PomscaleError
from pomscale.shards.index import map_index, npy_header

# Rows that are in memory at once where an array is written or read from end to end.
BLOCK = 65536


class ArrayWriter:
    """Writes a .npy file of rows whose number is known only at the end."""

    def __init__(self, stream: BufferedRandom, dtype: str, row_shape: tuple[int, ...] = ()) -> None:
        self._stream, self._dtype, self._row_shape = stream, np.dtype(dtype), row_shape
        self._num_rows = 0
        self._rows: list[int | tuple[int, int]] = []
        self._header_length = stream.write(self._header())

    def append(self, row: int | tuple[int, int]) -> None:
        self._rows.append(row)
        if len(self._rows) == BLOCK:
            self._flush()

    def finish(self) -> None:
        self._flush()
        self._stream.seek(0)
        written = self._stream.write(self._header())
        assert written == self._header_length, "NumPy pads headers so that the first axis may grow"

    def _header(self) -> bytes:
        return npy_header((self._num_rows, *self._row_shape), self._dtype)

    def _flush(self) -> None:
        self._stream.write(np.array(self._rows, self._dtype).tobytes())
        self._num_rows += len(self._rows)
        self._rows.clear()


def copy_on_disk(array: np.ndarray, folder: Path) -> np.ndarray:
    """Copy an array into a file without a name, which vanishes with the copy, also where the process is killed."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for begin in range(0, len(array), BLOCK):
                file.write(array[begin : begin + BLOCK].tobytes())
            file.flush()
            return np.asarray(np.memmap(file, array.dtype, "r+"))  # holds the file for itself
    except OSError as error:
        raise PomscaleError(
            f"{folder}: no room to sort {len(array):,} keys: {error}; make room and run the same command again"
        ) from error


def map_array(path: Path, dtype: str, row_shape: tuple[int, ...] = ()) -> np.ndarray:
    """Map a file of `ArrayWriter`. OSError, or ValueError if it is anything else."""
    row_bytes = math.prod(row_shape) * np.dtype(dtype).itemsize
    num_rows = max(0, path.stat().st_size - len(npy_header((0, *row_shape), dtype))) // row_bytes
    try:
        # As a plain array: slices of numpy.memmap are slow to make.
        return np.asarray(map_index(path, num_rows, np.dtype(dtype), row_shape))
    except ValueError as error:
        raise ValueError(f"{path.name}: is cut off, or its header is damaged") from error


class Spill:
    """A column of numbers that is kept in a file without a name until it is needed as an array."""

    def __init__(self, dtype: str, folder: Path) -> None:
        self._dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  lives as long as the array
        self._values: list[int] = []

    def append(self, value: int) -> None:
        self._values.append(value)
        if len(self._values) == BLOCK:
            self._flush()

    def array(self) -> np.ndarray:
        """Return the column, memory-mapped; it may be changed. ValueError if it is empty."""
        self._flush()
        self._file.flush()
        return np.asarray(np.memmap(self._file, self._dtype, "r+"))

    def _flush(self) -> None:
        self._file.write(np.array(self._values, self._dtype).tobytes())
        self._values.clear()
