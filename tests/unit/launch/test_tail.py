"""Reading what others append to, and drawing it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from launch.status.plot import plot
from launch.status.tail import Growing, objects, read_object, tail


def test_tail_begins_with_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert tail(path, 10) == b""
    path.write_bytes(b"first\nsecond\nthird\n")
    assert tail(path, 100) == b"first\nsecond\nthird\n"
    assert tail(path, 19) == b"first\nsecond\nthird\n"
    assert tail(path, 18) == b"second\nthird\n"
    assert tail(path, 13) == b"second\nthird\n"  # the line begins exactly there
    assert tail(path, 12) == b"third\n"
    assert tail(path, 3) == b""


def test_objects_leaves_out_what_is_none() -> None:
    assert objects(b'{"a": 1}\n[1]\n\n{"b": \n\xff\n{"c": 2}') == [{"a": 1}, {"c": 2}]


def test_read_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_object(path) is None
    for text, value in (('{"a": 1}', {"a": 1}), ("[1]", None), ("{", None), ("", None)):
        path.write_text(text)
        assert read_object(path) == value


def test_growing_gives_each_line_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    growing = Growing(path)
    assert growing.read() == b""
    with path.open("ab", buffering=0) as file:
        file.write(b"one\ntw")
        assert growing.read() == b"one\n"
        assert growing.read() == b""
        file.write(b"o\n")
        assert growing.read() == b"two\n"
        file.write(b"three\n")
        assert growing.read() == b"three\n"


@pytest.mark.parametrize("replace", ["cut off", "another file"])
def test_growing_begins_anew_with_a_new_file(replace: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\n")
    growing = Growing(path)
    growing.read()
    if replace == "cut off":
        path.write_bytes(b"new\n")
    else:
        (tmp_path / "other").write_bytes(b"new one\nnew two\n")
        (tmp_path / "other").rename(path)
    assert growing.read().startswith(b"new")


def test_growing_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\n")
    assert Growing(path, num_bytes=0).read() == b""
    assert Growing(path, num_bytes=4).read() == b"two\n"
    assert Growing(path, num_bytes=100).read() == b"one\ntwo\n"


def test_a_straight_line_is_drawn_straight() -> None:
    lines = plot(range(8), [float(value) for value in range(8)], width=8, height=2)
    assert lines[0].startswith("7 ")
    assert lines[1].startswith("0 ")
    # Up, one row of dots per column of dots: four characters hold eight of each, from bottom left to top right.
    dots = {(line, identity) for line, text in enumerate(lines) for identity, sign in enumerate(text[2:]) if sign > "⠀"}
    assert {line for line, _ in dots} == {0, 1}
    assert min(identity for line, identity in dots if line == 1) < min(identity for line, identity in dots if line == 0)


def test_a_plot_is_as_large_as_asked_for() -> None:
    values = [math.exp(-step / 10) for step in range(100)]
    lines = plot(range(100), values, width=40, height=6)
    assert len(lines) == 6
    assert max(map(len, lines)) == 40


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, math.nan]])
def test_nothing_to_draw(values: list[float]) -> None:
    assert plot(range(len(values)), values, width=20, height=4) == [""] * 4


def test_one_value_and_equal_values() -> None:
    assert len(plot([3], [1.0], width=20, height=4)) == 4
    assert len(plot([3, 3, 9], [1.0, 1.0, 1.0], width=20, height=4)) == 4


def test_logarithm_only_of_what_is_positive() -> None:
    """A curve over decades is not a bar at the bottom; one through zero stays as it is."""
    by_logarithm = plot(range(50), [10.0 ** (-step / 10) for step in range(50)], width=30, height=5)
    assert all(line.strip("⠀ ") for line in by_logarithm)
    through_zero = plot(range(50), [100.0, *[-0.01 * step for step in range(49)]], width=30, height=5)
    assert [line[6:].strip("⠀ ") != "" for line in through_zero] == [True] * 5
    assert all(len(line[6:].strip("⠀ ")) == 1 for line in through_zero[1:4])  # only the fall from the first value
