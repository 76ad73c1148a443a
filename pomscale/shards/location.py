"""The location of a dataset: a local folder, or a URL of any kind that fsspec knows.

A location is a str: a Path would swallow a slash of "s3://". This module imports neither torch nor numpy.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import fsspec

from pomscale.base.errors import InputError, PomscaleError

T = TypeVar("T")

# Pauses between the tries to read one file: an object store that is busy or restarting is back within seconds.
RETRY_DELAYS_S = (0.5, 2.0, 8.0)

# Errors that another try would meet again.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

# Answers 4xx that are worth another request: the server took too long to listen, or has too many of them.
_BUSY = (408, 429)

# Remedies for failures of this machine, which say nothing about the file that was to be read.
_MACHINE_REMEDIES = {
    errno.EMFILE: "Raise this process's limit of open files (`ulimit -n 65536`) and run the same command again",
    errno.ENFILE: "Raise this machine's limit of open files (sysctl fs.file-max) and run the same command again",
    errno.ENOMEM: "Free memory, or raise sysctl vm.max_map_count, and run the same command again",
    errno.EACCES: "Give this user the right to read it and run the same command again",
}


def local_folder(location: str | Path) -> Path | None:
    """Return the folder on this machine; None for a URL. A file:// URL is a local folder."""
    path = str(location).removeprefix("file://")
    return None if "://" in path else Path(path)


def join(location: str | Path, name: str) -> str:
    """Return the path or URL of a file of a dataset, for messages and for fsspec."""
    folder = local_folder(location)
    return f"{str(location).rstrip('/')}/{name}" if folder is None else str(folder / name)


def open_filesystem(source: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL and the file's path in it. InputError if there is none for this kind of URL."""
    try:
        return fsspec.url_to_fs(source)
    except (ImportError, ValueError) as error:  # a package that is not installed; an unknown kind
        raise InputError(f"{source}: this kind of URL cannot be read here: {error}") from error


def read_bytes(location: str | Path, name: str) -> bytes:
    """Read a small file of a dataset.

    Raises OSError where it cannot be read, PomscaleError where the connection keeps failing.
    """
    folder = local_folder(location)
    if folder is not None:
        return (folder / name).read_bytes()
    source = join(location, name)
    filesystem, path = open_filesystem(source)
    return retried(source, lambda: filesystem.cat_file(path), time.sleep)


def retried(source: str, attempt: Callable[[], T], sleep: Callable[[float], object]) -> T:
    """Return attempt(), tried again after each of RETRY_DELAYS_S while the network fails; in the end PomscaleError.

    Errors for a file that is missing or refused, and errors with a message for people, are raised at once.
    """
    for delay_s in (*RETRY_DELAYS_S, None):
        try:
            return attempt()
        except (PomscaleError, *_FINAL):
            raise
        except Exception as error:  # every backend has errors of its own: aiohttp's, botocore's, gcsfs's
            if _is_refusal(error):
                raise PomscaleError(
                    f"{source}: the server refuses it: {type(error).__name__}: {error}. "
                    f"Check the URL and the credentials, and run the same command again"
                ) from error
            if delay_s is None:
                raise PomscaleError(
                    f"{source}: cannot be read, {1 + len(RETRY_DELAYS_S)} attempts failed: "
                    f"{type(error).__name__}: {error}. When the connection is back, run the same command again"
                ) from error
            sleep(delay_s)
    raise AssertionError("the last attempt returns or raises")


def _is_refusal(error: Exception) -> bool:
    """Return whether an error is an answer of the server that would be the same the next time."""
    # gcsfs's errors call it `code`.
    status = error.status if hasattr(error, "status") else getattr(error, "code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _BUSY


def unreadable(source: str | Path, error: OSError) -> PomscaleError:
    """Return the error for a file that cannot be read, with a remedy for the machine or its storage."""
    default = "When the disk or the file server is back, run the same command again"
    remedy = _MACHINE_REMEDIES.get(error.errno or 0, default)
    return PomscaleError(f"{source}: cannot be read: {error}. {remedy}")
