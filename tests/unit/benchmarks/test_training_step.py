"""`pomscale bench step` refuses what it cannot compare, and the count of what a forward pass keeps is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pomscale.benchmarks.memory import kept_bytes
from pomscale.cli import main
from support.paths import RECIPES


def test_kept_bytes_are_those_of_the_tensors_that_stay() -> None:
    layer, x, kept = nn.Linear(8, 16), torch.randn(4, 8), []

    def forward() -> None:
        kept.append(torch.relu(layer(x)))  # the sum before the activation is not kept

    assert kept_bytes(forward, torch.device("cpu")) == 4 * 16 * 4
    assert kept_bytes(lambda: None, torch.device("cpu")) == 0


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("image/dipom-b-2", "JiTpp has no such network; take a recipe of recipes/image/jit-*"),
        ("image/jit-b-16", "expected a checkout of davidpicard/JiTpp, with denoiser.py"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    recipe: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ["--jitpp", str(tmp_path), "--pom", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "step", str(RECIPES / f"{recipe}.yaml"), *folders, "--device", "cpu"])
    assert message in capsys.readouterr().err
