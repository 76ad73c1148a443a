"""Which results may lie on one curve, and what is said of those that may not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from pomscale.runs.result_settings import flat, result_key, what_differs

SETTINGS: dict[str, Any] = {
    "checkpoint": {"path": "/a/samples-0064", "samples": 64, "average": {"name": "halflife-2000", "sha256": "aa"}},
    "sampler": {"name": "euler", "steps": 50, "guidance": 1.0, "interval": [0.0, 1.0]},
    "num_samples": 1000,
    "seeds": {"first": 0},
    "extractors": [{"spec": "inception:/here/weights.pth", "identity": "ff"}],
    "reference": {"path": "/here/ref.npz", "sha256": "bb", "count": 50000},
    "conventions": {"kid": "unbiased", "k": 3},
    "versions": {"torch": "2.13.0", "wandb": "0.25", "python": "3.12.1"},
    "host": "n1",
    "time_unix_s": 1.0,
}


def _changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    settings = copy.deepcopy(SETTINGS)
    change(settings)
    return settings


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["checkpoint"].update(path="/b", samples=128),
        lambda s: s["checkpoint"]["average"].update(sha256="cc"),
        lambda s: s["extractors"][0].update(spec="inception:/there/weights.pth"),
        lambda s: s["reference"].update(path="/there/ref.npz"),
        lambda s: s["versions"].update(wandb="0.26", python="3.13.0"),
        lambda s: s.update(host="n2", time_unix_s=2.0),
        lambda s: s["sampler"].update(guidance=1, interval=[0, 1]),
    ],
)
def test_what_does_not_matter_leaves_the_key(change: Callable[[dict[str, Any]], object]) -> None:
    assert result_key(_changed(change)) == result_key(SETTINGS)


@pytest.mark.parametrize(
    ("change", "label"),
    [
        (lambda s: s["sampler"].update(guidance=1.5), "guidance 1.5"),
        (lambda s: s["sampler"].update(interval=[0.0, 0.9]), "interval [0, 0.9]"),
        (lambda s: s["checkpoint"]["average"].update(name="model"), "name model"),
        (lambda s: s.update(num_samples=5000), "num_samples 5000"),
        (lambda s: s["seeds"].update(first=7), "first 7"),
        (lambda s: s["extractors"][0].update(identity="ee"), '{"spec": "inception", "identity": "ee"}'),
        (lambda s: s["reference"].update(sha256="dd"), "sha256 dd"),
        (lambda s: s["versions"].update(torch="2.14.0"), "torch 2.14.0"),
        (lambda s: s.update(new={"option": True}), "option true"),
        (lambda s: s["conventions"].pop("k"), "k none"),
    ],
)
def test_every_other_setting_makes_another_key_and_is_named(
    change: Callable[[dict[str, Any]], object], label: str
) -> None:
    settings = _changed(change)
    assert result_key(settings) != result_key(SETTINGS)
    assert label in what_differs([SETTINGS, settings])[1]


def test_a_label_has_all_keys_that_differ_between_any_two() -> None:
    one = _changed(lambda s: s["sampler"].update(guidance=2))
    two = _changed(lambda s: s["sampler"].update(steps=25))
    assert what_differs([SETTINGS, one, two]) == [
        "steps 50, guidance 1",
        "steps 50, guidance 2",
        "steps 25, guidance 1",
    ]
    assert what_differs([{}, SETTINGS]) == ["settings not recorded", ""]
    assert result_key({}) == ""


def test_labels_that_would_be_the_same_have_the_key() -> None:
    several = [{"a": n // 4, "b": 0, "c": n // 4, "d": n // 4, "e": n} for n in range(3)] + [
        {"a": 1, "b": 1, "c": 1, "d": 1, "e": 9}
    ]
    labels = what_differs(several)
    assert len(set(labels)) == 4
    assert labels[0].endswith(f"({result_key(several[0])})")


def test_lists_are_one_setting() -> None:
    assert flat({"a": {"b": [1, 2], "c": {}}, "d": None}) == {"a.b": [1, 2], "d": None}
