"""The recipe of captioned digits, as its first lines say: prompts draw the digit that they name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from support.running import run

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

HALF = ["training.total_samples=19200", "schedule.cooldown_samples=6400"]


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("overrides", [[], ["model.text=in_context", *HALF]], ids=["cross", "in context"])
def test_prompts_draw_the_digit_that_they_name(tmp_path: Path, overrides: list[str]) -> None:
    for command in (
        ["-m", "data_pipelines.demos.digits", "data/digits"],
        ["-m", "data_pipelines.demos.byte_t5", "data/byte-t5"],
        ["-m", "pomscale", "data", "encode", "data/digits-text"],
        ["-m", "pomscale", "data", "encode", "data/digits-text-heldout"],
        ["-m", "pomscale", "train", "image/digits-text", *overrides],
        ["-m", "pomscale", "sample", "runs/digits-text", "--num-samples", "20", "--npz", "digits.npz"],
        ["-m", "pomscale", "evaluate", "digits", "digits.npz", "--out", "digits.json"],
    ):
        run([sys.executable, *command], cwd=tmp_path, timeout=1700)
    figures = json.loads((tmp_path / "digits.json").read_text())
    assert figures["num_generated"] == 200
    assert figures["accuracy_real"] > 0.95
    assert figures["accuracy_generated"] >= 0.9
