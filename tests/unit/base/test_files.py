from __future__ import annotations

import resource
import threading
from pathlib import Path

import pytest

from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import atomic_write, check_suffix, remove_leftovers, write_text


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with atomic_write(tmp_path / "x") as stream:
            stream.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    write_text(tmp_path / "x", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["g.png", "g.PNG", "g", "a.b/g"])
def test_a_name_of_the_format_that_is_written_is_fine(name: str) -> None:
    check_suffix(Path(name), ".png")


@pytest.mark.parametrize("name", ["g.txt", "g.jpg", "g.png.bak"])
def test_a_name_of_another_format_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}: this file is written as \.png; name it g\."):
        check_suffix(Path(name), ".png")


def test_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    def write(letter: str) -> None:
        for _ in range(30):
            write_text(tmp_path / "x", letter * 100_000)

    threads = [threading.Thread(target=write, args=letter) for letter in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = (tmp_path / "x").read_text()
    assert content in {letter * 100_000 for letter in "abc"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_only_its_own_errors_are_told_as_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_write(tmp_path / "x"):
        (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(PomscaleError, match=r"cannot write .*nowhere/x: "):
        write_text(tmp_path / "nowhere" / "x", "")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PomscaleError, match=r"cannot write .*file/x: "):
        write_text(tmp_path / "file" / "x", "")


@pytest.mark.parametrize("num_bytes", [10, 1_000_000])  # written when the block ends, and inside it
def test_a_full_disk_is_told(tmp_path: Path, num_bytes: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
    try:
        with pytest.raises(PomscaleError, match=r"cannot write .*x: .*File too large.*make room"):
            write_text(tmp_path / "x", "x" * num_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_those_of_killed_writers_only(tmp_path: Path) -> None:
    for name in ("x.npy.123-0123abcd.tmp", "x.tmp", "x.npy"):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy", "x.tmp"]
