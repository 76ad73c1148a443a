"""The tree of a run folder: layout.py names every file, and no other module does."""

from __future__ import annotations

import ast
from pathlib import Path

import pomscale
from pomscale.runs import layout

NAMES = {value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}
PACKAGE = Path(pomscale.__file__).parent


def test_the_tree_shows_every_name() -> None:
    missing = [name for name in NAMES if name.rpartition("/")[2] not in (layout.__doc__ or "")]
    assert not missing


def test_no_other_module_of_pomscale_spells_a_file_of_a_run_folder() -> None:
    files = {name for name in NAMES if Path(name).suffix}
    spelled = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.value}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "layout.py" and path.parent.name != "benchmarks"  # they make recipes of their own
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in files
    ]
    assert not spelled


def test_paths_of_a_start_and_a_rank(tmp_path: Path) -> None:
    outcome, stacks = layout.outcome_path(tmp_path, 12, 345), layout.stacks_path(tmp_path, 12, 345)
    assert outcome == tmp_path / "outcomes" / "incarnation-0012-rank-00345.json"
    assert stacks == tmp_path / "stacks" / "incarnation-0012-rank-00345.txt"
    for path in (outcome, stacks):
        path.parent.mkdir()
        path.touch()
    assert (layout.outcome_paths(tmp_path), layout.stacks_paths(tmp_path)) == ([outcome], [stacks])
    assert layout.start_and_rank_of(outcome) == layout.start_and_rank_of(stacks) == (12, 345)
    assert layout.claim_path(tmp_path, 3) == tmp_path / "generations" / "000003"
