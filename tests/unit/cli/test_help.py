"""The help of every verb: each argument is described, and defaults are those of the parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import get_args

import pytest
from torch.distributed.run import get_args_parser

from pomscale.cli import _parser
from pomscale.config.names import SamplerName
from pomscale.diffusion.samplers import SAMPLERS


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from parsers(verb)


@pytest.mark.parametrize("parser", list(parsers(_parser())), ids=lambda parser: parser.prog)
def test_every_argument_is_described(parser: argparse.ArgumentParser) -> None:
    assert parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action._choices_actions:
                assert verb.help
                assert verb.help[0].isupper(), f"{parser.prog} {verb.dest}: {verb.help}"
        elif not isinstance(action, argparse._HelpAction | argparse._VersionAction):
            assert action.help, f"{parser.prog} {action.dest}"
            assert action.help[0].isupper(), f"{parser.prog} {action.dest}: {action.help}"
            if isinstance(action.default, int | float) and not isinstance(action.default, bool):
                assert "%(default)s" in action.help, f"{parser.prog} {action.dest}: {action.help}"


def test_the_samplers_that_the_command_offers_exist() -> None:
    assert set(get_args(SamplerName)) == set(SAMPLERS)


def shared_by_ranks() -> list[argparse.ArgumentParser]:
    """Verbs that run under torchrun: their ranks train together, or share the work by --task."""
    found = list(parsers(_parser()))
    return [one for one in found if one.prog == "pomscale train" or "--task" in one._option_string_actions]


@pytest.mark.parametrize("parser", shared_by_ranks(), ids=lambda parser: parser.prog)
def test_every_option_has_a_spelling_that_torchrun_leaves_alone(parser: argparse.ArgumentParser) -> None:
    """torchrun refuses options of the script that abbreviate two of its own (findings/)."""
    for action in parser._actions:
        if action.option_strings and not isinstance(action, argparse._HelpAction):
            words = [["-m", "pomscale", "verb", option] for option in action.option_strings]
            assert any(map(is_handed_on, words)), f"{parser.prog} {action.option_strings}"


def is_handed_on(words: list[str]) -> bool:
    try:
        return bool(get_args_parser().parse_args(words).training_script_args == words[2:])
    except SystemExit:
        return False
