"""The words of `pomscale runs ...`: the verb may be left out."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from pomscale.cli import runs, watch
from pomscale.cli.arguments import VerbParser


def parse(*words: str) -> argparse.Namespace:
    parser = VerbParser(prog="pomscale")
    verbs = parser.add_subparsers(required=True)
    runs.add(verbs)
    watch.add(verbs)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "folders"),
    [
        ([], []),
        (["--json"], []),
        (["--state", "running"], []),
        (["a", "b"], [Path("a"), Path("b")]),
        (["a", "--json"], [Path("a")]),
        (["list"], []),
        (["list", "status"], [Path("status")]),
        (["./status"], [Path("status")]),
    ],
)
def test_without_a_verb_it_is_the_list(words: list[str], folders: list[Path]) -> None:
    parsed = parse("runs", *words)
    assert parsed.run is runs._list
    assert parsed.folders == folders
    assert parsed.json == ("--json" in words)


def test_verbs_are_verbs() -> None:
    assert parse("runs", "status", "x").run_folder == "x"
    assert parse("runs", "logs", "x", "--rank", "all").rank is None
    assert parse("runs", "logs", "x", "--rank", "3").rank == 3
    assert parse("watch", "x").run is watch._watch


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["runs", "--jsn"], "unrecognized arguments: --jsn"),
        (["runs", "status"], "required: RUN"),
        (["runs", "logs", "x", "--rank", "-1"], "--rank"),
        (["runs", "logs", "x", "--rank", "first"], "a number from 0 on, or all"),
        (["runs", "logs", "x", "--lines", "0"], "at least 1"),
        (["runs", "sync", "--watch", "-1"], "at least 1"),
    ],
)
def test_wrong_words(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
