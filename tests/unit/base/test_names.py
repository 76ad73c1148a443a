"""Names that must not be longer than what takes them."""

from __future__ import annotations

from itertools import permutations

from pomscale.base.names import folder_words, shortened


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


NASTY = [
    "1",
    "-1",
    "--1",
    "1.",
    "_1",
    "a b",
    "a_b",
    "a/b",
    "a  b",
    "[1, 2]",
    "1,2",
    "",
    "-",
    "..",
    "ä",
    "ö",
    "A",
    "'a'",
    "a\nb",
]


def test_different_values_have_different_words() -> None:
    for strip in ("_", "_.-"):
        words = folder_words(NASTY, strip)
        assert len(set(words.values())) == len(NASTY)
        assert all(set(word) <= set("abcdefghijklmnopqrstuvwxyzA0123456789.-_") for word in words.values())
        for order in permutations(NASTY[:4]):
            assert folder_words([*order, *NASTY[4:]], strip) == words, "the order changes nothing"


def test_a_word_of_its_own_stays_plain() -> None:
    assert folder_words(["PoM v1", "0.5", "3e-4", "[pom, attention]"]) == {
        "PoM v1": "PoM_v1",
        "0.5": "0.5",
        "3e-4": "3e-4",
        "[pom, attention]": "pom_attention",
    }
    assert folder_words(["-1", "1"], "_.-")["1"] == "1"
    assert folder_words(["a b", "a_b"])["a_b"] == "a_b"
