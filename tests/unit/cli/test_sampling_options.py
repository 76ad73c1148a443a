"""Options of sampling on the command line: what is typed becomes the options, and all of them are offered."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from pomscale.cli import _parser
from pomscale.cli.sample.options import OPTIONS, add_sampling_options, sampling_changes
from pomscale.config.sampling import SamplingConfig
from pomscale.diffusion.options import SamplingOptions


def options(*words: str) -> SamplingOptions:
    parser = argparse.ArgumentParser()
    add_sampling_options(parser)
    return SamplingOptions.from_recipe(SamplingConfig(num_steps=20), **sampling_changes(parser.parse_args(words)))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", SamplingOptions(num_steps=20)),
        ("--sampler ddim --eta 0.5 --steps 7", SamplingOptions("ddim", 7, eta=0.5)),
        ("--grid rho", SamplingOptions(num_steps=20, grid="rho")),
        ("--rho 5", SamplingOptions(num_steps=20, rho=5.0)),
        ("--shift 2.5", SamplingOptions(num_steps=20, shift=2.5)),
        ("--times 1,0.6,0", SamplingOptions(times=(1.0, 0.6, 0.0))),
        (
            "--guidance 1.9 --guidance-interval 0,0.9 --guidance-schedule cosine --guidance-base-size 32",
            SamplingOptions(None, 20, 1.9, (0.0, 0.9), "cosine", 32.0),
        ),
    ],
)
def test_what_is_typed_becomes_the_options(words: str, expected: SamplingOptions) -> None:
    assert options(*words.split()) == expected


def test_every_option_can_be_typed_and_stands_in_a_recipe() -> None:
    names = {field.name for field in fields(SamplingOptions)}
    assert set(OPTIONS) == names
    assert names <= set(SamplingConfig.model_fields)
    _parser().parse_args(["sample", "run", "--guide", "other", "--times", "1,0"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--guidance-interval 0.5", "must be 2 numbers with a comma, got 0.5"),
        ("--guidance-interval 0,x", "invalid list of numbers value: '0,x'"),
        ("--times 1,nan,0", "must be a finite number, got nan"),
        ("--sampler euller", "invalid choice: 'euller'"),
        ("--eta inf", "must be a finite number, got inf"),
    ],
)
def test_what_is_no_value_is_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(*words.split())
    assert message in capsys.readouterr().err
