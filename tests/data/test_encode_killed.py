"""kill -9 at random moments of an encode, then the same command again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from encoding import contents, only
from PIL import Image

from data_pipelines.common.encode import encode
from pomscale.config.schema import EncodeRecipe
from pomscale.data.schema import MANIFEST_NAME

NUM_KILLS = 30

# Each encode is a fork of a process that has everything imported: the moments then lie in the work, from the listing of
# the source to the last commit, and not in the imports.
KILL_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
from data_pipelines.common.encode import encode
from pomscale.config.schema import EncodeRecipe
recipe = EncodeRecipe.model_validate_json(sys.argv[1])
moments, num_killed = random.Random(0), 0
for _ in range(10 * int(sys.argv[2])):
    child = os.fork()
    if not child:
        encode(recipe, progress=False)
        os._exit(0)
    time.sleep(moments.uniform(0.0, 0.25))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        num_killed += 1
    else:
        break
    if num_killed == int(sys.argv[2]):
        break
print(num_killed)
"""


@pytest.mark.slow
def test_resumed_shards_are_byte_identical(
    tmp_path: Path, make_recipe: Callable[..., EncodeRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for class_name in "ab":
        (tmp_path / "in" / class_name).mkdir(parents=True)
        for i in range(3000):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / class_name / f"{i:04d}.png", compress_level=0)
    (tmp_path / "in" / "a" / "0005.png").write_bytes(b"damaged")
    recipe = make_recipe(tmp_path / "in", output="latents", shard_samples=20)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    killed.mkdir()
    undisturbed.mkdir()

    command = [sys.executable, "-c", KILL_AGAIN_AND_AGAIN, recipe.model_dump_json(), str(NUM_KILLS)]
    done = subprocess.run(command, cwd=killed, capture_output=True, text=True, check=True, timeout=240)
    assert int(done.stdout) == NUM_KILLS
    assert not (killed / "latents" / MANIFEST_NAME).exists()

    monkeypatch.chdir(killed)
    report = encode(recipe, progress=False)
    assert report.num_resumed > 0
    assert report.num_made > 0
    assert only(report).num_failures == 1
    monkeypatch.chdir(undisturbed)
    encode(recipe, progress=False)
    files = [contents(folder / "latents") for folder in (killed, undisturbed)]
    assert files[0].keys() == files[1].keys()
    assert [name for name, content in files[0].items() if files[1][name] != content] == []
