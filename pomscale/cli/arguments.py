"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """RECIPE and its overrides."""
    what = "YAML file, or the name of a shipped recipe (see `pomscale config list`)"
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help=what)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to the recipe, e.g. optimizer.lr=3e-4")


def unknown_words(parsed: argparse.Namespace, rest: list[str]) -> list[str]:
    """Of those that argparse has left over. Overrides are not: it only takes no positional arguments after an option,
    as in `encode RECIPE --dry-run a.b=c`.
    """
    takes_overrides = hasattr(parsed, "overrides")
    return [word for word in rest if not takes_overrides or "=" not in word or word.startswith("-")]


def seed(text: str) -> int:
    """For `type=`: with room for the numbers after it, since the keys of random numbers have 64 bits."""
    value = int(text)
    if abs(value) >= 2**62:
        raise argparse.ArgumentTypeError(f"must lie between -2**62 and 2**62, got {value}")
    return value


def positive(text: str) -> int:
    """For `type=`: a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def finite(text: str) -> float:
    """For `type=`: float() takes "nan", too, which makes pictures of nothing."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value
