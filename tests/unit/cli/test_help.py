"""The help of every verb: each argument is described, and defaults are those of the parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import get_args

import pytest

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
