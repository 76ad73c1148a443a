"""Arguments that several verbs share, their types, and the parser of verbs."""

from __future__ import annotations

import argparse
import io
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, get_args

from pomscale.base.errors import InputError
from pomscale.config.hardware import Precision


class VerbParser(argparse.ArgumentParser):
    """A parser whose verb may be left out: words that begin with no known verb are arguments of `default_verb`.

    The namespace has the words behind the innermost verb as `words`, for commands that submit others like themselves.
    """

    def __init__(self, *arguments: Any, default_verb: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._default_verb = default_verb
        self.verbs: set[str] = set()

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Insert the default verb if none is given, and parse."""
        words = list(sys.argv[1:] if args is None else args)
        if self._default_verb is not None and not ({*words[:1]} & (self.verbs | {"-h", "--help"})):
            words.insert(0, self._default_verb)
        parsed, rest = super().parse_known_args(words, namespace)
        if not hasattr(parsed, "words"):
            parsed.words = words
        return parsed, rest


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add RECIPE and its overrides."""
    parser.add_argument(
        "recipe",
        type=Path,
        metavar="RECIPE",
        help="Recipe: a YAML file, or the name of a shipped recipe (see `pomscale config list`)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="Changes to the recipe, such as optimizer.lr=3e-4"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and --weights."""
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="Trained model: a run folder (its newest checkpoint), a checkpoint or an exported folder",
    )
    parser.add_argument(
        "--weights",
        default="ema",
        metavar="NAME",
        help="Set of weights to use: ema (the average that stands for the model), model (as last trained), or the name "
        "of an average (default: %(default)s)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="Device to compute on; auto is a GPU if there is one (default: %(default)s)",
    )


def add_exported(parser: argparse.ArgumentParser, *, with_dtype: bool = True) -> None:
    """Add --out, a new folder of exported weights, and --dtype."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="Directory to make, which load_pretrained reads"
    )
    if with_dtype:
        parser.add_argument(
            "--dtype",
            choices=get_args(Precision),
            default="fp32",
            help="Precision that the weights are stored in (default: %(default)s)",
        )


def unknown_words(parsed: argparse.Namespace, rest: list[str]) -> list[str]:
    """Return those of the words that argparse has not taken which are no overrides of a recipe.

    argparse takes no positional arguments after an option, as in `encode RECIPE --dry-run a.b=c`.
    """
    takes_overrides = hasattr(parsed, "overrides")
    return [word for word in rest if not takes_overrides or "=" not in word or word.startswith("-")]


def check_command(verbs: Mapping[str, argparse.ArgumentParser], words: list[str]) -> None:
    """Raise InputError for words that are no command of pomscale."""
    printed = io.StringIO()
    reason = f"the verbs are {', '.join(verbs)}"
    if words and words[0] in verbs:
        try:
            with redirect_stderr(printed):
                parsed, rest = verbs[words[0]].parse_known_args(words[1:])
        except SystemExit:
            reason = printed.getvalue().strip().rpartition("error: ")[2]
        else:
            if not unknown_words(parsed, rest):
                return
            reason = f"unrecognized arguments: {' '.join(rest)}"
    raise InputError(f"`pomscale {shlex.join(words)}` is no command: {reason}")


def seed(text: str) -> int:
    """Parse a seed. The keys of random numbers have 64 bits, and seeds counted up from this one must fit too."""
    value = int(text)
    if abs(value) >= 2**62:
        raise argparse.ArgumentTypeError(f"must lie between -2**62 and 2**62, got {value}")
    return value


def positive(text: str) -> int:
    """Parse a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def finite(text: str) -> float:
    """Parse a finite number; float() also takes "nan", which would make empty pictures."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value
