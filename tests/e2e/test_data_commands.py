"""The life of a dataset by the commands that users type."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.running import pomscale

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for class_name in ("cat", "dog"):
        (tmp_path / "in" / class_name).mkdir(parents=True)
        for i in range(30):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / class_name / f"{i:02d}.png")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
kind: encode
name: pets
output: {tmp_path}/pets
source: {{kind: image_folder, path: {tmp_path}/in}}
codec: {{name: pixel}}
transform: {{size: 16, flip: true}}
shard_samples: 16
"""
    )
    return path


def test_the_life_of_a_dataset(recipe: Path, tmp_path: Path) -> None:
    pets = tmp_path / "pets"
    planned = pomscale("data", "encode", recipe, "--dry-run").stdout
    assert "60 items in 2 classes" in planned
    assert not pets.exists()
    assert "60 samples in 4 shards" in pomscale("data", "encode", recipe).stdout
    assert "whole" in pomscale("data", "verify", pets).stdout
    before = {path.name: path.read_bytes() for path in pets.glob("shard-*.tar")}

    content = bytearray(before["shard-000002.tar"])
    content[700] ^= 4
    (pets / "shard-000002.tar").write_bytes(content)
    told = pomscale("data", "verify", pets, expect=1).stdout
    assert "shard-000002.tar: " in told
    assert "latent_crc32" in told
    assert "pomscale data repair" in told
    (tmp_path / "in").rename(tmp_path / "moved")
    refused = pomscale("data", "repair", pets, expect=2).stderr
    assert "source.path=" in refused
    mended = pomscale("data", "repair", pets, f"source.path={tmp_path}/moved").stdout
    assert "made again: shard-000002.tar" in mended
    assert {path.name: path.read_bytes() for path in pets.glob("shard-*.tar")} == before

    told = pomscale("data", "split", pets, f"{tmp_path}/train=0.8", f"{tmp_path}/heldout=0.2").stdout
    assert "samples per class" in told
    pomscale("data", "merge", tmp_path / "train", tmp_path / "heldout", "--out", tmp_path / "again")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("train", "heldout", "again")]
    assert manifests[0]["num_samples"] + manifests[1]["num_samples"] == manifests[2]["num_samples"] == 60
    assert "whole" in pomscale("data", "verify", tmp_path / "again").stdout
    assert "bytes" in pomscale("data", "stats", pets, "--out", tmp_path / "stats.png").stdout
    assert Image.open(tmp_path / "stats.png").size[0] > 100
    assert "60 pictures in 2 classes" in pomscale("data", "info", pets).stdout
    pomscale("data", "show", pets, "--num", "9", "--out", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (3 * 34 + 2, 3 * 34 + 2)
    pomscale("data", "split", pets, "half", expect=2)


def test_failures_are_told_by_the_exit_code(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "dog" / "07.png").write_bytes(b"no picture")
    told = pomscale("data", "encode", recipe, "shard_samples=8", expect=3)
    assert "1 items failed" in told.stdout
    failure = json.loads((tmp_path / "pets" / "failures.jsonl").read_text())
    assert failure["path"] == "dog/07.png"
    assert "whole; 1 items were skipped" in pomscale("data", "verify", tmp_path / "pets", expect=3).stdout
    pomscale("data", "encode", recipe, "shard_samples=8", "max_skipped=1")
    pomscale("data", "verify", tmp_path / "pets")
