"""The documentation is what the code is: generated pages are fresh, commands parse, paths exist."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from braceexpand import braceexpand
from torch.distributed.run import get_args_parser

from pomscale.cli.arguments import unknown_words

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("findings/*.md")])
CURRENT_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]
_PATH = re.compile(r"(pomscale|launch|data_pipelines|recipes|slurm|tests|docs|findings)/[\w./{},-]*")


def _load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _load_generator()


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _lines(page: Path) -> list[str]:
    """The lines of the code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += [line[4:] for line in text.splitlines() if line.startswith("    ") and page.parent == ROOT]
    return [line.strip() for line in lines]


def _commands(page: Path) -> list[str]:
    """The `pomscale` commands in the code blocks of a page."""
    found = (re.match(r"(?:torchrun .* -m )?(pomscale .*)", line) for line in _lines(page))
    return [match[1] for match in found if match]


def test_generated_pages_are_fresh() -> None:
    stale = [page.name for page, text in generate.pages().items() if page.read_text(encoding="utf-8") != text]
    assert not stale, "run `python docs/generate.py`"


def test_a_stale_page_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "metrics.md"
    page.write_text("before\n<!-- begin metrics (generated) -->\nold\n<!-- end metrics -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(generate, "REFERENCE", tmp_path)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "`train/loss`" in text


@pytest.mark.parametrize("page", [page for page in CURRENT_PAGES if _commands(page)], ids=_name)
def test_commands_parse(page: Path) -> None:
    parser = generate.command_parser()
    for command in _commands(page):
        words = shlex.split(command.split(" > ")[0], comments=True)[1:]
        try:
            parsed, rest = parser.parse_known_args(words)
        except SystemExit:
            pytest.fail(f"{command!r} is no command")
        assert not unknown_words(parsed, rest), command
        recipe = str(getattr(parsed, "recipe", None) or "RECIPE")
        exists = recipe.isupper() or (ROOT / recipe).is_file() or (ROOT / "recipes" / f"{recipe}.yaml").is_file()
        assert exists, f"{command!r} names no recipe"


def test_torchrun_hands_on_the_options_of_the_documented_commands() -> None:
    """torchrun refuses, or takes for itself, what abbreviates an option of its own."""
    lines = [line for page in CURRENT_PAGES for line in _lines(page) if line.startswith("torchrun ")]
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        parsed = get_args_parser().parse_args(words)
        assert (parsed.module, parsed.training_script) == (True, "pomscale"), line
        assert parsed.training_script_args == words[words.index("pomscale") + 1 :]


def test_torchrun_hands_on_every_option_of_what_runs_on_ranks() -> None:
    """Every option has a spelling that torchrun leaves alone; `--num` is the short form of one."""
    refused = set()
    verbs = next(one for one in generate.command_parser()._actions if isinstance(one, argparse._SubParsersAction))
    of_ranks = [verbs.choices[verb] for verb in ("train", "data", "sample", "evaluate")]
    for action in (action for verb in of_ranks for action in _options(verb)):
        for option in action.option_strings:
            try:
                parsed = get_args_parser().parse_args(["-m", "pomscale", "sample", option, "1"])
            except SystemExit:
                refused.add(option)
                assert set(action.option_strings) - {option}, f"torchrun refuses {option}"
            else:
                assert parsed.training_script_args == ["sample", option, "1"]
    assert refused == {"--num"}


def _options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options of a parser and of those of its verbs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in {id(verb): verb for verb in action.choices.values()}.values():
                yield from _options(verb)
        elif action.option_strings:
            yield action


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=_name)
def test_paths_exist(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    paths = [path for span in spans if _PATH.fullmatch(span) for path in braceexpand(span)]
    missing = [path for path in paths if not re.search(r"[A-Z]{3}", path) and not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=_name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^|    )make ([a-z-]+)", text, re.MULTILINE))
    assert named <= targets


def test_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 6000
