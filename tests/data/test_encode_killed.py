"""kill -9 at random moments of an encode, then the same command again."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.encode.encode import encode
from pomscale.config.encode import EncodeRecipe
from pomscale.shards.schema import MANIFEST_NAME
from support.encoding import contents, only

PICTURES_PER_PART = 20

# Each encode is a fork of a process that has everything imported: the moments then lie in the work, from the listing of
# the source to the last commit, and not in the imports. A moment is a number of commits and a time after them, which is
# given as a share of an undisturbed encode: so the kills together get some way and never to the end, at any speed.
# Where others slowed the undisturbed one down, or the one who kills comes late, an encode kills itself before that.
KILL_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
from data_pipelines.encode.encode import encode
from data_pipelines.shards.parts import PARTS_FOLDER, PartStore
from pathlib import Path
from pomscale.config.encode import EncodeRecipe
recipe = EncodeRecipe.model_validate_json(sys.argv[1])
num_kills, undisturbed_s, most_records = int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
num_records = lambda: len(list(Path(recipe.output, PARTS_FOLDER).glob("part-*.json")))
commit = PartStore.commit
def commit_but_never_all(*arguments):
    if num_records() >= most_records:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(*arguments)
PartStore.commit = commit_but_never_all
moments, num_killed = random.Random(0), 0
for _ in range(num_kills):
    num_commits, later_s = moments.randrange(6), moments.uniform(0.0, 0.03) * undisturbed_s
    before = num_records()
    child = os.fork()
    if not child:
        encode(recipe, progress=False)
        os._exit(0)
    has_ended = lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    while num_records() < before + num_commits and not has_ended():
        time.sleep(0.002)
    time.sleep(later_s)
    os.kill(child, signal.SIGKILL)
    num_killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
print(num_killed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [10, pytest.param(30, marks=pytest.mark.exhaustive)])
def test_resumed_shards_are_byte_identical(
    tmp_path: Path, make_recipe: Callable[..., EncodeRecipe], monkeypatch: pytest.MonkeyPatch, num_kills: int
) -> None:
    num_parts = 10 * num_kills
    rng = np.random.default_rng(0)
    for class_name in "ab":
        (tmp_path / "in" / class_name).mkdir(parents=True)
        for i in range(num_parts * PICTURES_PER_PART // 2):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / class_name / f"{i:04d}.png", compress_level=0)
    (tmp_path / "in" / "a" / "0005.png").write_bytes(b"damaged")
    recipe = make_recipe(tmp_path / "in", output="latents", shard_samples=PICTURES_PER_PART)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    killed.mkdir()
    undisturbed.mkdir()

    monkeypatch.chdir(undisturbed)
    start = time.monotonic()
    encode(recipe, progress=False)
    undisturbed_s = time.monotonic() - start
    limits = [str(num_kills), str(undisturbed_s), str(num_parts - 10)]
    command = [sys.executable, "-c", KILL_AGAIN_AND_AGAIN, recipe.model_dump_json(), *limits]
    done = subprocess.run(command, cwd=killed, capture_output=True, text=True, check=True, timeout=240)
    assert int(done.stdout) == num_kills
    assert not (killed / "latents" / MANIFEST_NAME).exists()

    monkeypatch.chdir(killed)
    report = encode(recipe, progress=False)
    assert report.num_resumed > 0
    assert report.num_made > 0
    assert only(report).num_failures == 1
    files = [contents(folder / "latents") for folder in (killed, undisturbed)]
    assert files[0].keys() == files[1].keys()
    assert [name for name, content in files[0].items() if files[1][name] != content] == []
