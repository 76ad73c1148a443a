from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.sources.item_fields import ClassIds


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_class_per_line_whatever_its_name_holds(tmp_path: Path, newline: str) -> None:
    """str.splitlines knows other ends of lines, and would shift the ids of all classes after such a name."""
    names = ["cat", "a\u2028b", "a\x85b", "tabby\x0ccat", "dog"]
    (tmp_path / "names.txt").write_bytes(newline.join([*names, ""]).encode())
    classes = ClassIds(str(tmp_path / "names.txt"))
    classes.begin()
    assert classes.names == tuple(names)
