"""Names that must not be longer than what takes them."""

from __future__ import annotations

from pomscale.base.names import shortened


def test_a_name_that_fits_stays() -> None:
    assert shortened("a" * 128, 128) == "a" * 128


def test_a_longer_name_keeps_its_beginning_and_stays_different() -> None:
    long = [shortened(f"grid.lr={'1' * 300}-seed={seed}", 128) for seed in range(50)]
    assert len(set(long)) == 50
    assert {len(name) for name in long} == {128}
    assert all(name.startswith("grid.lr=111") for name in long)
    assert shortened(f"grid.lr={'1' * 300}-seed=7", 128) == long[7]


def test_the_limit_is_one_of_bytes_and_no_letter_is_cut() -> None:
    name = shortened("ä" * 200, 128)
    assert 126 <= len(name.encode()) <= 128
    assert set(name.rpartition("-")[0]) == {"ä"}
