"""Map files into memory without a file descriptor each, so that a process can have thousands of them.

`mmap.mmap` keeps a duplicate of the descriptor for as long as the mapping lives (Python 3.13 can be told not to), and
the usual limit of a process is 1,024. The kernel needs none: a mapping holds the opened file itself, and with it its
flock.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import BinaryIO

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (*2 * (ctypes.c_size_t,), *3 * (ctypes.c_int,), ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

_FAILED = ctypes.c_void_p(-1).value


class _Mapping:
    """The memory of a mapped file, for numpy; the array, and every view of it, keeps it alive."""

    def __init__(self, address: int, num_bytes: int) -> None:
        read_only = True
        self.__array_interface__ = {
            "version": 3,
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, read_only),
        }
        weakref.finalize(self, _libc.munmap, address, num_bytes).atexit = False


def map_file(file: BinaryIO, num_bytes: int) -> np.ndarray:
    """Map the first `num_bytes` of a file, which must exist, read-only as (num_bytes,) uint8. `file` may be closed."""
    address = _libc.mmap(0, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), file.name)
    return np.asarray(_Mapping(address, num_bytes))
