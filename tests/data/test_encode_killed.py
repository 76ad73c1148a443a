"""kill -9 in the middle of an encode, then the same command again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.common.encode import encode
from pomscale.config.schema import EncodeRecipe

NUM_PARTS = 60

# The encode of the command line, with pictures that take their time so that there is a middle to kill it in.
SLOW_ENCODE = """
import sys, time
from data_pipelines.common import encode as module
from pomscale.config.schema import EncodeRecipe
real = module.load_picture
def slow(*args):
    time.sleep(0.01)
    return real(*args)
module.load_picture = slow
module.encode(EncodeRecipe.model_validate_json(sys.argv[1]), progress=False)
"""


def test_resumed_shards_are_byte_identical(
    tmp_path: Path, make_recipe: Callable[..., EncodeRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for class_name in "ab":
        (tmp_path / "in" / class_name).mkdir(parents=True)
        for i in range(300):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / class_name / f"{i:03d}.png")
    (tmp_path / "in" / "a" / "005.png").write_bytes(b"damaged")
    recipe = make_recipe(tmp_path / "in", output="latents", shard_samples=10)

    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    for folder in (killed, undisturbed):
        folder.mkdir()
    for num_parts in (2, 7):
        process = subprocess.Popen([sys.executable, "-c", SLOW_ENCODE, recipe.model_dump_json()], cwd=killed)
        try:
            while len(list(killed.glob("latents/parts/part-*.json"))) < num_parts:
                assert process.poll() is None, "the encode ended before it could be killed"
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == -signal.SIGKILL
        assert not (killed / "latents" / "manifest.json").exists()
        assert len(list(killed.glob("latents/parts/part-*.json"))) < NUM_PARTS

    monkeypatch.chdir(killed)
    report = encode(recipe, progress=False)
    assert report.num_resumed_parts >= 7
    assert report.num_failures == 1
    monkeypatch.chdir(undisturbed)
    encode(recipe, progress=False)
    files = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (killed, undisturbed)]
    assert files[0].keys() == files[1].keys()
    assert [name for name, content in files[0].items() if files[1][name] != content] == []
