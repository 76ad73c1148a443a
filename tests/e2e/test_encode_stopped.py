"""What clusters do to an encode: SIGUSR2 before the time limit, then the same command again."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.running import TIMEOUT_S, pomscale, started

pytestmark = pytest.mark.slow

NUM_PICTURES = 2000

# The command, which goes no further than where its signal is to meet it, however late that comes.
AT_TORCH = """
import sys, time
from importlib.abc import MetaPathFinder
from pomscale.cli import main

class Held(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            time.sleep(3600)

sys.meta_path.insert(0, Held())
main()
"""
AFTER_SOME_PARTS = """
import itertools, time
from data_pipelines.encode.part_encoder import PartEncoder
from pomscale.cli import main
from pomscale.distributed import stop

begin, numbers = PartEncoder._begin, itertools.count(1)

def begin_or_wait(*arguments):
    if next(numbers) == 16:
        while not stop._current.requested:
            time.sleep(0.02)
    return begin(*arguments)

PartEncoder._begin = begin_or_wait
main()
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output by name, without the logs of its tasks."""
    files = (path for path in folder.rglob("*") if path.is_file() and "task-" not in str(path))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "a").mkdir(parents=True)
    for i in range(NUM_PICTURES):
        pixels = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / "a" / f"{i:04d}.png", compress_level=0)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "kind: encode\nname: noise\noutput: latents\ncodec: {name: pixel}\ntransform: {size: 64, flip: true}\n"
        f"source: {{kind: image_folder, path: {tmp_path}/in}}\nshard_samples: 50\n"
    )
    return path


def signal_handled(process_id: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process_id}/status").read_text())
    assert caught is not None
    return bool(int(caught[1], 16) >> (number - 1) & 1)


def encode_and_signal(recipe: Path, folder: Path, number: signal.Signals, num_parts: int) -> tuple[int, str]:
    """(exit code, what it printed) of an encode that gets a signal once it has made `num_parts` parts."""
    held = AFTER_SOME_PARTS if num_parts else AT_TORCH
    command = [sys.executable, "-c", held, "data", "encode", str(recipe)]
    with started(command, cwd=folder) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while not (
            signal_handled(process.pid, number)
            and len(list((folder / "latents" / "parts").glob("part-*.json"))) >= num_parts
        ):
            assert process.poll() is None, "it ended before the signal"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        out, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out


def test_stopped_encode_goes_on_to_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    stopped.mkdir()
    undisturbed.mkdir()

    code, _ = encode_and_signal(recipe, stopped, signal.SIGUSR1, num_parts=0)  # while torch is being imported
    assert code == 75
    assert not (stopped / "latents").exists()
    for number, num_parts in ((signal.SIGUSR2, 1), (signal.SIGTERM, 8)):
        code, out = encode_and_signal(recipe, stopped, number, num_parts)
        assert code == 75
        assert "stopped on request" in out
        assert not (stopped / "latents" / "manifest.json").exists()
        # The part in hand is dropped, those that were finished are kept.
        records = list((stopped / "latents" / "parts").glob("part-*.json"))
        assert num_parts <= len(records) < NUM_PICTURES // 50
        shards = {path.name for path in (stopped / "latents").iterdir() if path.is_file()}
        assert shards == {f"shard-{record.stem[-6:]}.tar" for record in records}
    assert "were there" in pomscale("data", "encode", recipe, cwd=stopped).stdout
    pomscale("data", "encode", recipe, cwd=undisturbed)
    ours, theirs = contents(stopped / "latents"), contents(undisturbed / "latents")
    assert ours.keys() == theirs.keys()
    assert [name for name, content in theirs.items() if ours[name] != content] == []
