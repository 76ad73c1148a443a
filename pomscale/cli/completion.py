"""`pomscale completion`: scripts that make a shell complete verbs, options and their values."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

_SHELLS = {
    "bash": 'eval "$(pomscale completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(pomscale completion zsh)" in ~/.zshrc, after compinit',
    "fish": "pomscale completion fish > ~/.config/fish/completions/pomscale.fish",
}


def add(verbs: Any, parser: argparse.ArgumentParser) -> None:
    """Add the verb, whose script completes all verbs of `parser`."""
    completion = verbs.add_parser(
        "completion",
        help="Print the script that makes a shell complete this command",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Print the script that makes a shell complete this command. To use it:\n\n"
        + "\n".join(f"  {shell:<6}{use}" for shell, use in _SHELLS.items()),
    )
    completion.add_argument("shell", choices=list(_SHELLS), help="Shell that reads the script")
    completion.set_defaults(run=partial(_completion, parser))


def _completion(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    import shtab

    _complete_paths(parser)
    print(shtab.complete(parser, arguments.shell))
    return 0


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Make arguments that are paths complete file names, in the parser and in those of its verbs."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _complete_paths(verb)
        elif action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
