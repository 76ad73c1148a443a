"""`pomscale bench packed` measures networks whose packed loss is that of batches of one shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pomscale.cli import main


def test_packed_steps_are_measured_beside_those_of_each_shape(tmp_path: Path) -> None:
    sizes = ["--dim", "32", "--depth", "1", "--tokens", "900", "--num-turns", "1"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["bench", "packed", "--device", "cpu", *sizes, "--out", str(tmp_path / "packed.json")])
    found = json.loads((tmp_path / "packed.json").read_text())
    assert len(found["verdicts"]) == 4
    assert "failures" not in found
    packed = [row for row in found["rows"] if row["what"].endswith("packed")]
    assert [row["padding"] for row in packed] == [0] * 4
    assert all(600 < row["tokens"] <= 900 for row in packed)
