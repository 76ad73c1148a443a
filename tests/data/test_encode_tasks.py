"""Several encodes of one recipe on one output."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.check.verify import verify
from data_pipelines.encode.encode import encode
from pomscale.base.claims import Claims
from pomscale.base.errors import InputError
from pomscale.base.task_index import TaskIndex, this_task
from pomscale.config.encode import EncodeRecipe
from pomscale.monitoring import monitor as monitor_module
from pomscale.monitoring.wandb import run as wandb_run
from pomscale.shards.schema import MANIFEST_NAME
from support.encoding import contents, only
from support.running import open_process

MakeRecipe = Callable[..., EncodeRecipe]


# Claims a part as another task would, and holds it until its input ends.
HOLDER = """
import sys
from pathlib import Path
from pomscale.base.claims import Claims
with Claims(Path(sys.argv[1]), several=True) as claims:
    assert claims.claim(int(sys.argv[2]))
    print("held", flush=True)
    sys.stdin.read()
"""


# The command, on a machine on which no commit takes less than a quarter of a second.
UNHURRIED = """
import sys, time
from data_pipelines.shards.parts import PartStore
from pomscale.cli import main
commit = PartStore.commit
def commit_late(*arguments):
    time.sleep(0.25)
    commit(*arguments)
PartStore.commit = commit_late
main(sys.argv[1:])
"""


def start_task(recipe: Path, task: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pomscale", "data", "encode", str(recipe), "--task", task]
    return open_process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_pictures(folder: Path, count: int) -> None:
    for class_name in "ab":
        (folder / class_name).mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20, 20), (i % 256, i // 256, 7)).save(folder / "ab"[i % 2] / f"{i:04d}.png")


@pytest.mark.slow
def test_tasks_share_the_work_and_the_last_one_finishes(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    write_pictures(tmp_path / "in", 600)
    alone = make_recipe(tmp_path / "in", output=str(tmp_path / "alone"))
    encode(alone, progress=False)
    recipe = make_recipe(tmp_path / "in")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.model_dump_json())
    # Task 2 is there twice, as after a requeue that came too early.
    tasks = [start_task(path, text) for text in ("0/3", "1/3", "2/3", "2/3")]
    outputs = [task.communicate(timeout=240) for task in tasks]
    assert [task.returncode for task in tasks] == [0] * 4, outputs
    made = [int(out.split(" of 120 parts made")[0].split()[-1]) for out, _ in outputs]
    assert sum(made) == 120
    assert any("600 samples in 120 shards" in out for out, _ in outputs)
    assert verify(recipe.output).problems == []
    together, reference = contents(Path(recipe.output)), contents(Path(alone.output))
    del together[MANIFEST_NAME], reference[MANIFEST_NAME]  # hold the recipe, with its output
    assert together == reference


def test_a_part_that_another_task_has_claimed_is_left_to_it(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures)
    folder = Path(recipe.output) / "parts"
    command = [sys.executable, "-c", HOLDER, str(folder), "2"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        report = encode(recipe, progress=False)
        assert (report.datasets, report.num_made, report.num_elsewhere, report.exit_code) == ((), 4, 1, 0)
        assert "the last one will finish the dataset" in str(report)
        assert not (Path(recipe.output) / MANIFEST_NAME).exists()
    finally:
        process.kill()  # its claim dies with it
        process.communicate()
    assert only(encode(recipe, progress=False)).num_samples == 21


def test_a_file_system_without_locks_is_warned_of(
    pictures: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    assert only(encode(make_recipe(pictures), progress=False)).num_samples == 21
    assert capsys.readouterr().err.count("do not start a second process") == 1
    with pytest.raises(InputError, match=r"has no locks.*use one task"):
        encode(make_recipe(pictures, output=str(pictures.parent / "other")), progress=False, task=TaskIndex(0, 2))


def test_a_stop_keeps_what_was_finished(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    write_pictures(tmp_path / "in", 400)
    recipe = make_recipe(tmp_path / "in")
    calls = iter(range(10**9))
    report = encode(recipe, progress=False, stop=lambda: next(calls) >= 100)
    assert (report.stopped, report.exit_code) == (True, 75)
    assert 1 <= report.num_made < 80
    assert not [name for name in contents(Path(recipe.output)) if name.endswith(".tmp")]
    assert only(encode(recipe, progress=False)).num_samples == 400
    assert verify(recipe.output).problems == []


@pytest.mark.slow
def test_a_signal_stops_the_command(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    write_pictures(tmp_path / "in", 3000)
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe(tmp_path / "in").model_dump_json())
    # It is to be met in the middle, and has 600 parts.
    command = [sys.executable, "-c", UNHURRIED, "data", "encode", str(path), "--task", "0/1"]
    process = open_process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not list((tmp_path / "latents" / "parts").glob("part-*.json")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert "stopped on request" in out


def test_which_task_is_this(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT", "SLURM_PROCID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert this_task(None) == TaskIndex(0, 1)
    assert this_task("3/1000") == TaskIndex(3, 1000)
    for wrong in ("3", "4/4", "-1/4", "a/b"):
        with pytest.raises(InputError, match="--task"):
            this_task(wrong)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "10")
    assert this_task(None) == TaskIndex(2, 10)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert this_task(None) == TaskIndex(19, 80)


def test_tasks_begin_apart_and_cover_everything() -> None:
    orders = [TaskIndex(index, 3).order(8) for index in range(3)]
    assert orders[1] == [1, 4, 7, 2, 5, 0, 3, 6]
    assert all(sorted(order) == list(range(8)) for order in orders)


def test_claims_of_one_process_do_not_stop_itself(tmp_path: Path) -> None:
    with Claims(tmp_path, several=True) as claims:
        assert claims.claim(3)
        assert claims.claim(3)
        claims.release(3)


@pytest.mark.slow
def test_wandb_gets_what_the_console_shows(
    pictures: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of wandb's work is done when the encode ends, and on a busy machine its process takes many seconds to start.
    monkeypatch.setattr(monitor_module, "CLOSE_TIMEOUT_S", 120.0)
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT_S", 90.0)
    recipe = make_recipe(pictures, wandb={"mode": "offline", "project": "encodes"})
    encode(recipe, progress=False)
    (run,) = (Path(recipe.output) / "parts" / "task-00000" / "wandb").glob("offline-run-*/run-*.wandb")
    content = run.read_bytes()
    for name in (b"encode/items_per_s", b"encode/failed", b"encode/busy_share", b"test-00000"):
        assert name in content


def test_failures_are_tried_again_by_one_task_each(pictures: Path, make_recipe: MakeRecipe) -> None:
    for name in ("cat/00.png", "dog/03.jpg", "eel/05.webp"):
        (pictures / name).write_bytes(b"damaged")
    recipe = make_recipe(pictures)
    assert only(encode(recipe, progress=False)).num_failures == 3
    parts = {
        path for path in (Path(recipe.output) / "parts").glob("part-*.json") if '"failures": []' not in path.read_text()
    }
    made = [encode(recipe, progress=False, task=TaskIndex(i, 3), only_failed=True).num_made for i in range(3)]
    assert sum(made) == len(parts)
    assert verify(recipe.output).problems == []


def test_a_task_that_comes_late_tells_of_failures_too(pictures: Path, make_recipe: MakeRecipe) -> None:
    (pictures / "cat" / "00.png").write_bytes(b"damaged")
    recipe = make_recipe(pictures)
    encode(recipe, progress=False, task=TaskIndex(0, 2))
    late = encode(recipe, progress=False, task=TaskIndex(1, 2))
    assert (late.num_made, only(late).num_failures, late.exit_code) == (0, 1, 3)
