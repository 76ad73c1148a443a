from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pomscale.sources.item_fields import ClassIds


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_class_per_line_whatever_its_name_holds(tmp_path: Path, newline: str) -> None:
    """str.splitlines knows other ends of lines, and would shift the ids of all classes after such a name."""
    names = ["cat", "a\u2028b", "a\x85b", "tabby\x0ccat", "dog"]
    (tmp_path / "names.txt").write_bytes(newline.join([*names, ""]).encode())
    classes = ClassIds(str(tmp_path / "names.txt"))
    classes.begin()
    assert classes.names == tuple(names)


@pytest.mark.parametrize("value", [3, 3.0, "3", " 3 ", "3.0", "3.", "+3", "03"])
def test_whole_numbers_are_class_ids(value: Any) -> None:
    assert ClassIds(None).checked(value) == (3, None)


@pytest.mark.parametrize("value", ["1_0", "1e2", "\u0663", "0x3", "inf", "nan", "3.5", "-3", True, [3], 1e400])
def test_other_texts_that_python_takes_for_numbers_are_none(value: Any) -> None:
    """A class called 1_0 or 1e2 would have the id 10 or 100, and nobody would know."""
    label, problem = ClassIds(None).checked(value)
    assert label is None
    assert problem is not None
    assert "is no class id" in problem
