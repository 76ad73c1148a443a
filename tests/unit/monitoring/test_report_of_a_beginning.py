"""The report of a run that has not come to its first step."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pomscale.monitoring.report.run import sample_prompts
from pomscale.monitoring.report.write import write_report
from pomscale.monitoring.sinks import JsonlSink


def test_there_is_one(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path, 1)
    sink.log(0, {"preflight/matmul_tflops": 1.5})
    sink.close()
    paths = write_report([tmp_path])
    Image.open(paths.png).verify()
    assert "preflight/matmul_tflops" in paths.html.read_text()


@pytest.mark.parametrize("content", ["", "sampling: {prompts: [a", "[1, 2]", "sampling:", "sampling: {prompts:}"])
def test_a_recipe_that_cannot_be_read_says_nothing_of_prompts(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    assert sample_prompts(tmp_path) == []
