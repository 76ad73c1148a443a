"""A save that is torn at any byte, and a file that has changed since, is never loaded; the one before it is."""

from __future__ import annotations

import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pomscale.base.errors import InputError
from pomscale.checkpoint.store import CheckpointStore, complete_checkpoints, find_checkpoint, read_meta, read_tensors
from pomscale.config.engine import CheckpointConfig
from pomscale.distributed.world import join_world
from pomscale.runs.layout import MARKER
from pomscale.runs.starts import Start
from support.running import run

KILLED_SAVES = Path(__file__).with_name("killed_saves.py")
NUM_PLACES = 8


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"weight": torch.full((30, 20), value), "bias": torch.full((20,), value)}}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    """The store of a run with checkpoints at 10 and 20 samples, in a world of one."""
    with join_world("cpu"):
        store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(every_samples=10), Start.claim(tmp_path))
        for samples in (10, 20):
            store.save(samples, state(samples), {"samples": samples})
        store.wait()
        yield store


def damages() -> Iterator[tuple[str, Callable[[Path, random.Random], None]]]:
    yield "removed", lambda path, _: path.unlink()
    yield "emptied", lambda path, _: path.write_bytes(b"")
    yield "longer", lambda path, _: path.write_bytes(path.read_bytes() + b"\0")
    for number in range(NUM_PLACES):
        yield f"cut {number}", cut
        yield f"flipped {number}", flip
        yield f"zeroed {number}", zero


def cut(path: Path, places: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: places.randrange(len(content))])


def flip(path: Path, places: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[places.randrange(len(content))] ^= 1 << places.randrange(8)
    path.write_bytes(content)


def zero(path: Path, places: random.Random) -> None:
    """Leave the file as after a power cut, when its length has reached the disk and its content has not."""
    content = path.read_bytes()
    begin = places.randrange(len(content.rstrip(b"\0")))
    path.write_bytes(content[:begin] + bytes(len(content) - begin))


def test_every_damage_to_every_file_is_found_and_the_one_before_is_loaded(
    store: CheckpointStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older, torn = complete_checkpoints(store.root)
    good = shutil.copytree(torn, tmp_path / "good")
    names = sorted(path.name for path in good.iterdir())
    assert names == [".metadata", MARKER, "__0_0.distcp", "checkpoint.json", "checksums.json"]
    places = random.Random(0)
    for name in names:
        for what, damage in damages():
            shutil.rmtree(torn, ignore_errors=True)
            shutil.copytree(good, torn)
            store.damaged = []
            assert store.newest() == torn
            damage(torn / name, places)
            _assert_refused(torn, name)
            assert store.newest() == older, (name, what)
            store.load(older, loaded := state(0.0))
            assert loaded["model"]["weight"].eq(10).all()
            if (name, what) == (MARKER, "removed"):  # not a damage: a save that did not finish
                assert store.damaged == []
                continue
            (found,) = store.damaged
            assert name in found.reason
            assert found.folder == torn.with_name(f"{torn.name}.damaged")
            assert (found.folder.exists(), torn.exists()) == (True, False)
            assert complete_checkpoints(store.root) == [older]
            assert f"{found.reason}. This checkpoint is DAMAGED" in capsys.readouterr().err
            shutil.rmtree(found.folder)


def _assert_refused(torn: Path, name: str) -> None:
    """Assert that reading exactly this folder is one clear error, and that no other checkpoint is read instead."""
    with pytest.raises(InputError, match=re.escape(str(torn))):
        read_tensors(_asked_for(torn), state(0.0))
    if name == "checkpoint.json":
        with pytest.raises(InputError, match=r"checkpoint\.json"):
            read_meta(torn)


def _asked_for(torn: Path) -> Path:
    return find_checkpoint(torn) if (torn / "checkpoint.json").exists() else torn


def test_two_damaged_ones_and_nothing_left(store: CheckpointStore) -> None:
    (store.root / "samples-000000000020.damaged").mkdir()  # from another time
    for checkpoint in complete_checkpoints(store.root):
        cut(checkpoint / "__0_0.distcp", random.Random(0))
    assert store.newest() is None
    assert [damaged.folder.name for damaged in store.damaged] == [
        "samples-000000000020.damaged-2",
        "samples-000000000010.damaged",
    ]


def test_killed_before_every_step_of_a_save(tmp_path: Path) -> None:
    """See killed_saves.py. Steps: folders made, files opened, renamed, deleted, of the save and of the clearing up."""
    done = run([sys.executable, str(KILLED_SAVES), "steps", str(tmp_path)])
    steps = re.fullmatch(r"killed before each of (\d+) steps\n", done.stdout)
    assert steps is not None
    assert int(steps[1]) >= 20


def test_killed_at_random_moments_of_saving(tmp_path: Path) -> None:
    done = run([sys.executable, str(KILLED_SAVES), "moments", str(tmp_path)])
    assert done.stdout.startswith("killed at 15 moments")
