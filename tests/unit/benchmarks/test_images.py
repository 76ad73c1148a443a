"""`pomscale bench images`: what it counts as the network's, and a rival that cannot start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from pomscale.base.errors import InputError
from pomscale.benchmarks import images
from pomscale.benchmarks.beside_torch_fidelity import Rival, compare_features, write_pictures, write_weights
from pomscale.benchmarks.report import BenchReport

STAND_IN = """
import json, sys
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps({"seconds": 1.0, "means": {"2048": 1e3, "logits_unbiased": 1e3}}), flush=True)
"""


def test_time_in_the_network_is_a_part_of_the_whole(tmp_path: Path) -> None:
    report = BenchReport("images")
    images._overhead(report, tmp_path, num_pictures=10)
    (row,) = report.rows
    assert 0.5 * row["processor_s"] < row["in_network_s"] < row["processor_s"]
    assert not torch.nn.modules.module._global_forward_hooks, "a hook would slow down all networks of the process"


def test_a_rival_that_cannot_run_torch_fidelity(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be started"):
        Rival(tmp_path / "python", tmp_path / "weights", 1)
    with pytest.raises(InputError, match="pip install torch-fidelity"):
        Rival(Path(sys.executable), tmp_path / "weights", 1)


def test_other_features_than_the_rivals_are_a_failure(tmp_path: Path) -> None:
    python = tmp_path / "python"
    (tmp_path / "rival.py").write_text(STAND_IN)
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/rival.py\n")
    python.chmod(0o755)
    report = BenchReport("images")
    rival = Rival(python, tmp_path, 1)
    compare_features(report, rival, write_weights(tmp_path / "weights.pth"), write_pictures(tmp_path / "a", 1), 1)
    rival.close()
    assert [line.split(" is ")[0] for line in report.failures] == ["the mean of 2048", "the mean of logits_unbiased"]
