from __future__ import annotations

import pytest

from pomscale.base.errors import InputError
from pomscale.shards.class_names import check_same_classes, class_difference


@pytest.mark.parametrize(
    ("here", "there", "difference"),
    [
        ("abc", "abc", None),
        ("", "", None),
        ("cab", "abc", "class 0 is 'c' here and 'a' there"),
        ("abd", "abc", "class 2 is 'd' here and 'c' there"),
        ("ab", "abc", "class 2 is missing here and 'c' there"),
        ("abc", "", "class 0 is 'a' here and missing there"),
    ],
)
def test_the_first_class_that_differs_is_named(here: str, there: str, difference: str | None) -> None:
    assert class_difference(tuple(here), tuple(there)) == difference
    if difference is not None:
        with pytest.raises(InputError, match=f"x: its classes are not those of y: {difference}. Encode one of them"):
            check_same_classes("x", tuple(here), "y", tuple(there))
