"""The two kinds of failure a user meets. Everything else is a bug and keeps its traceback.

This module imports nothing, so that every package may raise the same errors, and the command line turns them into one
clear message and an exit code.
"""

from __future__ import annotations


class PomscaleError(Exception):
    """A failure with a message for people: what happened, to which file, and the remedy. Exit code 1."""

    exit_code = 1


class InputError(PomscaleError):
    """Wrong input: a recipe, an argument, or data that is refused before work starts. Exit code 2."""

    exit_code = 2
