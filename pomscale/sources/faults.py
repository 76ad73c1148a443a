"""Errors of storage, told apart: those about one path, and those that say nothing about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pomscale.base.errors import InputError, PomscaleError
from pomscale.shards.location import described, refusal
from pomscale.sources.protocol import SourceChangedError

# Errors about a path or the file there; storage itself works.
_PATH_ERRORS = {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}


class PathError(OSError):
    """An OSError whose number is one of _PATH_ERRORS."""


# Errors about a path, as `told_apart` returns them.
ABOUT_PATH = (FileNotFoundError, PermissionError, PathError)


def told_apart(path: str, error: Exception) -> Exception:
    """Return an error as one of ABOUT_PATH, or as InputError, if it is either; else as it is."""
    status = refusal(error)
    if status is not None:
        kind, number = (FileNotFoundError, errno.ENOENT) if status == 404 else (PermissionError, errno.EACCES)
        return kind(number, f"the server answers {status}", path)
    if isinstance(error, FileNotFoundError) and error.strerror is None:  # fsspec's has the path and no reason
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if isinstance(error, ImportError):
        return InputError(f"{path}: this kind of URL cannot be read here: {error}")
    if isinstance(error, ValueError):  # a zero byte, half a surrogate pair, a kind of URL that does not exist
        return PathError(errno.EINVAL, str(error), path)
    if isinstance(error, OSError) and error.errno in _PATH_ERRORS:
        return PathError(error.errno, error.strerror, path)
    return error


@contextmanager
def while_opening(path: str) -> Iterator[None]:
    """Raise one of ABOUT_PATH where a path is at fault, PomscaleError where storage fails."""
    with while_reading(path, passed=ABOUT_PATH):
        try:
            yield
        except Exception as error:
            told = told_apart(path, error)
            if told is error:
                raise
            raise told from error


@contextmanager
def while_reading(path: str, passed: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raise PomscaleError for all errors but those in `passed`: the content was there when it was opened."""
    raised_as_it_is: tuple[type[Exception], ...] = (PomscaleError, *passed)
    try:
        yield
    except raised_as_it_is:
        raise
    except Exception as error:  # every storage has errors of its own
        raise PomscaleError(
            f"{path}: cannot be read: {described(error)}. What was finished before is kept; "
            f"run the same command again to continue"
        ) from error


@contextmanager
def about_item() -> Iterator[None]:
    """Raise SourceChangedError where an item's file cannot be opened for reasons of its own."""
    try:
        yield
    except (PermissionError, PathError) as error:
        raise SourceChangedError(f"cannot be read: {error.strerror or error}") from error
