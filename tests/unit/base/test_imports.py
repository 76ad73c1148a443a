"""Imports with the garbage collector put off."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from pomscale.base.imports import large_imports


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_the_collector_rests_meanwhile_and_works_again_afterwards() -> None:
    with large_imports():
        assert not gc.isenabled()
        with large_imports():
            assert not gc.isenabled()
        assert not gc.isenabled(), "it rests until the outer one has ended"
    assert gc.isenabled()


def test_an_import_that_fails_wakes_it_up() -> None:
    with pytest.raises(ImportError), large_imports():
        import pomscale.no_such_module  # type: ignore[import-not-found]  # noqa: F401, PLC0415
    assert gc.isenabled()


def test_a_program_that_has_switched_it_off_is_left_alone() -> None:
    gc.disable()
    with large_imports():
        pass
    assert not gc.isenabled()


def test_what_was_imported_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "made_for_this_test.py").write_text("kept = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.get_freeze_count()
    with large_imports():
        pass
    assert gc.get_freeze_count() == before, "nothing was imported: what there is may be garbage"
    with large_imports():
        import made_for_this_test  # type: ignore[import-not-found]  # noqa: PLC0415
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    assert len(made_for_this_test.kept) == 1000
    assert frozen >= before + 1000
