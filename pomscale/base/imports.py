"""Large imports in three quarters of the time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Around imports of torch and of what is larger still: nobody looks for garbage in what they make.

    That is a million objects that stay. Python's collector goes through all that are there each time their number has
    grown by a quarter, and finds nothing: 0.8 of the 3.1 s that training's imports take, 2.1 of diffusers' 7.1 s. Nor
    does it look at them later, when each full collection would hold up a training step.
    """
    if not gc.isenabled():
        yield
        return
    num_modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_modules:  # or what is frozen would be garbage of the caller's
            gc.freeze()
        gc.enable()
