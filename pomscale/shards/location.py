"""The location of a dataset: a local folder, or a URL of any kind that fsspec knows.

A location is a str: a Path would swallow a slash of "s3://". This module imports neither torch nor numpy.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from pomscale.base.errors import InputError, PomscaleError

T = TypeVar("T")

# Pauses between the tries to read one file: an object store that is busy or restarting is back within seconds.
RETRY_DELAYS_S = (0.5, 2.0, 8.0)

# Longest times of one attempt over HTTP: to connect, and without a byte. fsspec itself would wait for five minutes.
CONNECT_TIMEOUT_S = 15.0
READ_TIMEOUT_S = 30.0

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
        return find_filesystem(source)
    except (ImportError, ValueError) as error:  # a package that is not installed; an unknown kind
        raise InputError(f"{source}: this kind of URL cannot be read here: {error}") from error


def find_filesystem(source: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return what `open_filesystem` returns; ImportError or ValueError if there is none for this kind of URL."""
    options: dict[str, Any] = {}
    if source.startswith(("http://", "https://")):
        import aiohttp  # noqa: PLC0415  optional, it comes with fsspec's http

        # No limit for a whole download, which may be large.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
        options["client_kwargs"] = {"timeout": timeout}
    return fsspec.url_to_fs(source, **options)


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


def retried(
    source: str,
    attempt: Callable[[], T],
    sleep: Callable[[float], object],
    final: tuple[type[Exception], ...] = (),
) -> T:
    """Return attempt(), tried again after each of RETRY_DELAYS_S while the network fails; in the end PomscaleError.

    Errors for a file that is missing or refused, errors with a message for people, and those in `final`, are raised at
    once.
    """
    raised_at_once: tuple[type[Exception], ...] = (PomscaleError, *_FINAL, *final)
    for delay_s in (*RETRY_DELAYS_S, None):
        try:
            return attempt()
        except raised_at_once:
            raise
        except Exception as error:  # every backend has errors of its own: aiohttp's, botocore's, gcsfs's
            if refusal(error) is not None:
                raise PomscaleError(
                    f"{source}: the server refuses it: {described(error)}. "
                    f"Check the URL and the credentials, and run the same command again"
                ) from error
            if delay_s is None:
                raise PomscaleError(
                    f"{source}: cannot be read, {1 + len(RETRY_DELAYS_S)} attempts failed: "
                    f"{described(error)}. When the connection is back, run the same command again"
                ) from error
            sleep(delay_s)
    raise AssertionError("the last attempt returns or raises")


def described(error: Exception) -> str:
    """Return an error's type and, where it has one, its message: that of a time-out is often empty."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def refusal(error: Exception) -> int | None:
    """Return the status of an error that is a server's answer, the same the next time (403, 404, ...); else None."""
    # gcsfs's errors call it `code`.
    status = error.status if hasattr(error, "status") else getattr(error, "code", None)
    return status if isinstance(status, int) and 400 <= status < 500 and status not in _BUSY else None


def unreadable(source: str | Path, error: OSError) -> PomscaleError:
    """Return the error for a file that cannot be read, with a remedy for the machine or its storage."""
    default = "When the disk or the file server is back, run the same command again"
    remedy = _MACHINE_REMEDIES.get(error.errno or 0, default)
    return PomscaleError(f"{source}: cannot be read: {described(error)}. {remedy}")
