"""Whole runs with faults in them (faulty_train.py): what is kept, what is reported, and how the next start resumes."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from pomscale.checkpoint.store import complete_checkpoints, find_checkpoint, read_meta
from pomscale.runs.history import read_history, samples_seen
from pomscale.runs.ledger import goodput
from pomscale.runs.outcome import write_outcome
from support.running import (
    GLOBAL_BATCH,
    TIMEOUT_S,
    Finished,
    assert_same_run,
    checkpoint_samples,
    losses,
    mounted_disk,
    outcome,
    rows,
    run,
    start_and_signal,
    started,
    train,
    write_tiny_recipe,
)

WORKER = Path(__file__).with_name("faulty_train.py")
HOST = socket.gethostname()
STEPS = 30
SHORT = ("schedule={}", f"training.total_samples={STEPS * GLOBAL_BATCH}", "faults.preflight=false")
NAN = "nan"

Fault = dict[str, Any]


def faulty_command(faults: list[Fault], recipe: Path, *overrides: str, num_processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    program = [str(WORKER), json.dumps(faults), str(recipe), *SHORT, *overrides]
    return [sys.executable, *(launcher if num_processes > 1 else []), *program]


def train_with(
    faults: list[Fault], recipe: Path, *overrides: str, expect: int, num_processes: int = 1, **options: Any
) -> Finished:
    return run(faulty_command(faults, recipe, *overrides, num_processes=num_processes), expect, **options)


def at_steps(first: int, end: int, factor: float | str = NAN) -> Fault:
    """In the steps `first` to `end` - 1, counted from 0 by their data, one sample weighs so much more."""
    assert end == first + 1 or factor == NAN
    return {"factor": factor, "positions": [first * GLOBAL_BATCH, end * GLOBAL_BATCH]}


def folder_of(recipe: Path) -> Path:
    return recipe.parent / "runs" / "tiny"


def saved(folder: Path) -> list[int]:
    """Samples of the complete checkpoints."""
    return [read_meta(checkpoint)["samples"] for checkpoint in complete_checkpoints(folder / "checkpoints")]


def events(folder: Path) -> list[dict[str, Any]]:
    return [row for row in ledger_rows(folder) if row.get("event", "alert") != "alert"]


def alerts(folder: Path) -> list[str]:
    return [row["title"] for row in ledger_rows(folder) if row.get("event") == "alert"]


def ledger_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def the_error(done: Finished, rank: int | None = None) -> str:
    """The one line that a user gets, without a traceback."""
    start = "error: " if rank is None else f"[rank {rank}] error: "
    (line,) = [line for line in done.stderr.splitlines() if line.startswith(start)]
    if rank is None:
        assert "Traceback" not in done.stderr
    return line.removeprefix(start)


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process without a fault."""
    recipe = write_tiny_recipe(tmp_path_factory.mktemp("undisturbed"), digits)
    train(recipe, *SHORT)
    return folder_of(recipe)


@pytest.mark.slow
def test_signals_during_validation_and_saves(undisturbed: Path, digits: Path, tiny_recipe: Path) -> None:
    folder = folder_of(tiny_recipe)
    every = 5 * GLOBAL_BATCH
    overrides = (
        f"checkpoint={{every_samples: {every}, keep_last: 9}}",
        f"validation={{path: {digits}/latents/heldout, every_samples: {every}, num_samples: 8, num_time_bins: 2}}",
    )
    in_validation = {"do": "send", "number": "SIGUSR2", "at": "validation", "nth": 2}
    train_with([in_validation], tiny_recipe, *overrides, expect=75)
    # The validation ended first, and one more step brought the ranks' agreement.
    assert max(row["samples"] for row in rows(folder) if "validation/loss" in row) == 2 * every
    assert outcome(folder)["state"] == "stopped"
    assert outcome(folder)["samples"] == checkpoint_samples(folder) == 11 * GLOBAL_BATCH

    in_save = {"do": "send", "number": "SIGUSR1", "at": "commit", "nth": 1, "then_wait_s": 1.0}
    train_with([in_save], tiny_recipe, *overrides, expect=75)
    assert outcome(folder)["samples"] == checkpoint_samples(folder) > 3 * every
    assert 3 * every in saved(folder)  # the save that was under way is not lost, either
    assert [event["signal"] for event in events(folder)] == ["SIGUSR2", "SIGUSR1"]

    # A disk that is away: the stop cannot save. The user asks again.
    kept = contents(find_checkpoint(folder))
    away = {"do": "send", "number": "SIGTERM", "at": "commit", "nth": 1, "then_wait_s": 2.5}
    done = train_with([away, away], tiny_recipe, *overrides, expect=128 + signal.SIGTERM)
    assert "SIGTERM twice: ended at once, without a save" in done.stderr
    assert outcome(folder)["state"] == "quit"
    assert outcome(folder)["incarnation"] == 3
    assert contents(find_checkpoint(folder)) == kept

    train_with([], tiny_recipe, *overrides, expect=0)
    assert_same_run(folder, undisturbed)
    assert outcome(folder)["state"] == "finished"
    # The partial folder of the save that was given up is gone.
    assert len(list((folder / "checkpoints").glob("samples-*"))) == len(saved(folder))


@pytest.mark.exhaustive  # test_parity.py has a stop of two ranks while they compile
def test_a_stop_during_compilation(tiny_recipe: Path) -> None:
    """The first step is done, whatever it takes, and saved. All processes get the signal, those of compilers too."""
    folder = folder_of(tiny_recipe)
    fault = {"do": "send", "number": "SIGUSR1", "at": "step", "nth": 1, "after_s": 1.0, "to_group": True}
    train_with([fault], tiny_recipe, "compute.compile=true", expect=75, start_new_session=True)
    assert outcome(folder)["state"] == "stopped"
    assert checkpoint_samples(folder) == GLOBAL_BATCH
    train_with([], tiny_recipe, "compute.compile=true", expect=0)
    assert list(losses(folder)) == [GLOBAL_BATCH * step for step in range(1, STEPS + 1)]


NANS = [at_steps(5, 6), at_steps(15, 18)]


@pytest.fixture(scope="module")
def with_nans(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two processes: one NaN is left out, three in a row lead back to the checkpoint of step 10."""
    recipe = write_tiny_recipe(tmp_path_factory.mktemp("nans"), digits)
    train_with(NANS, recipe, expect=0, num_processes=2)
    return folder_of(recipe)


def test_steps_that_are_not_finite_are_left_out_and_then_gone_back_from(with_nans: Path) -> None:
    assert read_progress(with_nans) == {
        "samples": STEPS * GLOBAL_BATCH,
        "position": (STEPS + 1 + 7) * GLOBAL_BATCH,
        # Step 5 was left out before the checkpoint, which lies at position 11; then all up to the last NaN.
        "skipped": [[5 * GLOBAL_BATCH, 6 * GLOBAL_BATCH], [11 * GLOBAL_BATCH, 18 * GLOBAL_BATCH]],
        "num_rollbacks": 1,
    }
    assert [row["faults/skipped_steps"] for row in rows(with_nans) if "faults/skipped_steps" in row][-1] == 4
    *skips, rollback = events(with_nans)
    assert [skip["position"] // GLOBAL_BATCH for skip in skips] == [5, 15, 16]
    assert rollback["to_samples"] == 10 * GLOBAL_BATCH
    assert "not finite" in rollback["reason"]
    assert alerts(with_nans) == ["not finite", "rollback"]  # each told once
    balance = goodput(with_nans)
    assert balance is not None
    assert balance.seconds["lost"] > 0
    assert outcome(with_nans)["state"] == "finished"


@pytest.mark.slow
def test_a_kill_after_a_rollback_changes_nothing(with_nans: Path, tiny_recipe: Path) -> None:
    """Here the loss of step 5 is infinite and its gradient is not: it must not be stepped either."""
    overflow = {"do": "make_the_loss_infinite", "at": "step", "nth": 6, "rank": 1}
    kill = {"do": "send", "number": "SIGKILL", "at": "step", "nth": 24, "rank": 1}
    train_with([NANS[1], overflow, kill], tiny_recipe, expect=1, num_processes=2)
    folder = folder_of(tiny_recipe)
    assert [event["event"] for event in events(folder)][-1] == "rollback"
    assert checkpoint_samples(folder) == 10 * GLOBAL_BATCH
    train_with(NANS, tiny_recipe, expect=0, num_processes=2)
    assert_same_run(folder, with_nans)
    assert read_progress(folder) == read_progress(with_nans)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_deepspeed_does_the_same(stage: int, with_nans: Path, tiny_recipe: Path) -> None:
    pytest.importorskip("deepspeed")
    engine = ["engine=deepspeed", f"deepspeed.zero_stage={stage}"]
    train_with(NANS, tiny_recipe, *engine, expect=0, num_processes=2)
    folder = folder_of(tiny_recipe)
    assert read_progress(folder) == read_progress(with_nans)
    assert losses(folder) == pytest.approx(losses(with_nans), rel=1e-3)


def read_progress(folder: Path) -> dict[str, Any]:
    """Read the clock and the number of rollbacks from the newest checkpoint."""
    meta = read_meta(find_checkpoint(folder))
    clock = {key: meta[key] for key in ("samples", "position", "skipped")}
    return {**clock, "num_rollbacks": meta["divergence"]["num_rollbacks"]}


@pytest.mark.slow
def test_a_run_that_cannot_go_on_gives_up(undisturbed: Path, tiny_recipe: Path) -> None:
    folder = folder_of(tiny_recipe)
    done = train_with([at_steps(2, STEPS)], tiny_recipe, expect=1)
    assert the_error(done).startswith(
        f"loss nan and gradient norm nan: not finite, at global positions {4 * GLOBAL_BATCH} to "
        f"{5 * GLOBAL_BATCH - 1}, and there is no checkpoint to go back to. Check the data"
    )
    assert outcome(folder)["state"] == "failed"
    assert saved(folder) == []

    done = train_with([at_steps(12, 99)], tiny_recipe, "faults.max_rollbacks=1", expect=1)
    assert "and the run has gone back 1 times already (faults.max_rollbacks)" in the_error(done)
    assert outcome(folder)["incarnation"] == 2
    assert "gone back 1 times" in outcome(folder)["reason"]
    assert saved(folder) == [10 * GLOBAL_BATCH]
    # Nothing of it is in the checkpoint: with the data repaired, the run is that of one that met no fault.
    train_with([], tiny_recipe, expect=0)
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_a_loss_spike_leads_back_past_a_damaged_checkpoint(tiny_recipe: Path) -> None:
    """The newest checkpoint turns out to be damaged when it is needed: the one before it is good. Without DeepSpeed."""
    folder = folder_of(tiny_recipe)
    faults = [
        {"missing": "deepspeed"},
        at_steps(24, 25, 1e4),
        {"do": "damage_the_newest_checkpoint", "at": "step", "nth": 24, "root": str(folder / "checkpoints")},
    ]
    overrides = ["faults.loss_spike={num_steps: 16}", "checkpoint.asynchronous=false"]
    done = train_with(faults, tiny_recipe, *overrides, expect=0)
    assert "DAMAGED" in done.stderr
    happened = {event["event"]: event for event in events(folder)}
    assert happened.keys() == {"damaged_checkpoint", "rollback"}
    rollback = happened["rollback"]
    assert rollback["to_samples"] == 10 * GLOBAL_BATCH
    assert "robust standard deviations above its median" in rollback["reason"]
    assert saved(folder) == [20 * GLOBAL_BATCH, 30 * GLOBAL_BATCH]
    assert read_meta(find_checkpoint(folder))["skipped"] == [[10 * GLOBAL_BATCH, 25 * GLOBAL_BATCH]]
    assert max(losses(folder).values()) < 100
    # The return counts over restarts.
    longer = f"training.total_samples={(STEPS + 10) * GLOBAL_BATCH}"
    done = train_with([at_steps(0, 99)], tiny_recipe, longer, "faults.max_rollbacks=1", expect=1)
    assert "and the run has gone back 1 times already (faults.max_rollbacks)" in the_error(done)
    assert [event["event"] for event in events(folder)].count("rollback") == 1


@pytest.mark.slow
def test_a_hang_ends_with_the_stacks_of_all_ranks(tiny_recipe: Path) -> None:
    folder = folder_of(tiny_recipe)
    overrides = ["faults.hang_timeout_s=60"]
    asleep = {"do": "sleep", "at": "step", "nth": 13, "rank": 1}
    # Rank 1 has longer: once it is gone, the other has lost its connection, and does not hang any more.
    watched = {"do": "expect_a_hang", "at": "step", "nth": 13, "rank": 0, "within_s": 5.0}
    train_with(
        [asleep, watched, {**watched, "rank": 1, "within_s": 9.0}], tiny_recipe, *overrides, expect=1, num_processes=2
    )
    assert outcome(folder)["state"] == "hung"
    assert outcome(folder)["reason"] == "no step for 5 s"
    assert alerts(folder) == ["stall"]  # told while it hung, at half of that time
    assert " in sleep\n" in stacks(folder, 1, rank=1)
    assert " in forward_backward\n" in stacks(folder, 1, rank=0)  # it waits for the other
    assert saved(folder) == [10 * GLOBAL_BATCH]

    # Python's own threads of that rank cannot run any more; a timer in C can.
    holding = {"do": "hold_the_lock", "at": "step", "nth": 3, "rank": 1}
    watched["nth"] = 3
    train_with(
        [holding, watched, {**watched, "rank": 1, "within_s": 6.0}], tiny_recipe, *overrides, expect=1, num_processes=2
    )
    assert outcome(folder)["state"] == "hung"
    assert outcome(folder)["incarnation"] == 2
    assert " in hold_the_lock\n" in stacks(folder, 2, rank=1)
    assert saved(folder) == [10 * GLOBAL_BATCH]

    done = train_with([], tiny_recipe, *overrides, expect=0, num_processes=2)
    assert "resuming from" in done.stdout
    assert outcome(folder)["state"] == "finished"
    assert not list((folder / "stacks").glob("incarnation-0003-*"))


def stacks(folder: Path, start: int, rank: int) -> str:
    return (folder / "stacks" / f"incarnation-{start:04d}-rank-{rank:05d}.txt").read_text()


def test_out_of_memory_is_explained(tiny_recipe: Path) -> None:
    """One rank runs out of memory: its outcome is that of the run, since the other only notices that it has ended."""
    folder = folder_of(tiny_recipe)
    fault = {"do": "allocate", "at": "step", "nth": 13, "rank": 1}
    done = train_with([fault], tiny_recipe, expect=1, num_processes=2)
    error = the_error(done, rank=1)
    assert error.startswith("out of memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate 11258999")
    assert "Resident: parameters 0.00 GiB, optimizer 0.00 GiB, ema 0.00 GiB; this process" in error
    assert "What to change, cheapest first: training.micro_batch=1|2|4" in error
    assert outcome(folder)["state"] == "failed"
    assert outcome(folder)["rank"] == 1
    assert "out of memory" in outcome(folder)["reason"]
    assert saved(folder) == [10 * GLOBAL_BATCH]


@pytest.mark.slow
def test_starts_that_were_taken_for_dead_change_nothing(undisturbed: Path, tiny_recipe: Path) -> None:
    """Four starts of one run. The first three are paused, and wake up while the fourth trains, which is paused too."""
    folder = folder_of(tiny_recipe)
    pause = {"do": "send", "number": "SIGSTOP", "rank": 0}
    with ExitStack() as stack:

        def start(fault: Fault, *overrides: str) -> subprocess.Popen[str]:
            command = faulty_command([fault], tiny_recipe, *overrides)
            process = stack.enter_context(started(command, stderr=subprocess.PIPE))
            wait_until_paused(process)
            return process

        at_once = "checkpoint.asynchronous=false"
        # In a step.
        first = start({**pause, "at": "step", "nth": 13}, at_once)
        assert saved(folder) == [10 * GLOBAL_BATCH]
        # In the middle of a save, of which the newest start has found half, and deleted it.
        second = start({**pause, "at": "commit", "nth": 1})
        # In a step, where it goes on to hang until it is told to quit.
        third = start({**pause, "at": "step", "nth": 3, "then_wait_s": 1000.0})
        newest = start({**pause, "at": "step", "nth": 15}, at_once)
        assert saved(folder) == [10 * GLOBAL_BATCH, 20 * GLOBAL_BATCH]
        before = contents(folder)
        metrics = (folder / "metrics.jsonl").read_text()
        assert_superseded(wake_up(first), by=newest)
        # What its thread had not written before the pause, at most: no row of the step in which it woke up.
        grown = (folder / "metrics.jsonl").read_text()
        assert grown.startswith(metrics)
        late = [json.loads(line) for line in grown.removeprefix(metrics).splitlines()]
        assert all(row["incarnation"] == 1 and row["samples"] <= 12 * GLOBAL_BATCH for row in late), late
        assert_superseded(wake_up(second), by=newest)
        assert wake_up(third, and_send=signal.SIGTERM)[0] == 128 + signal.SIGTERM
        # Rows of processes that outlived their replacement are left out when they are read; nothing else has changed.
        changed = {path for path, content in contents(folder).items() if before.get(path) != content}
        assert {path.name for path in changed if path.parent.name != "stacks"} <= {"events.jsonl", "metrics.jsonl"}
        code, told = wake_up(newest)
        assert code == 0
        assert f"another start of this run is still alive ({HOST}, process {third.pid}, " in told
    assert_same_run(folder, undisturbed)
    assert outcome(folder)["incarnation"] == 4
    assert outcome(folder)["state"] == "finished"
    history = read_history(folder)
    assert history.resumed_at == [10 * GLOBAL_BATCH] * 3
    assert history.series["train/loss"][0] == list(losses(undisturbed))
    for checkpoint in complete_checkpoints(folder / "checkpoints"):
        assert read_meta(checkpoint)["incarnation"] == 4
    assert len(list((folder / "checkpoints").glob("samples-*"))) == len(saved(folder))


def assert_superseded(ended: tuple[int, str], by: subprocess.Popen[str]) -> None:
    code, told = ended
    assert code == 1
    (error,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: a newer start ({HOST}, process {by.pid}, ")


def wait_until_paused(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline, "it did not get to its pause"
        time.sleep(0.05)


def wake_up(process: subprocess.Popen[str], *, and_send: signal.Signals | None = None) -> tuple[int, str]:
    """Exit code and stderr. and_send: every few seconds, so that the second one ends it."""
    process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + TIMEOUT_S
    while and_send is not None and process.poll() is None and time.monotonic() < deadline:
        process.send_signal(and_send)
        time.sleep(2.5)
    _, told = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, told


def test_a_replica_that_differs_is_found_and_named(tiny_recipe: Path) -> None:
    """Three copies of the model; a bit of one flips."""
    folder = folder_of(tiny_recipe)
    overrides = ["fsdp2.shard_size=1", f"faults.consistency_every_samples={4 * GLOBAL_BATCH}"]
    flip = {"do": "flip_a_bit", "at": "step", "nth": 14, "rank": 1, "parameter": "trunk.1.ffn.0.weight"}
    done = train_with([flip], tiny_recipe, *overrides, expect=1, num_processes=3)
    for rank in range(3):
        error = the_error(done, rank)
        assert error.startswith(f"rank 1 ({HOST}): its copy of ")
        assert "is not that of the 2 other ranks" in error
    assert list(losses(folder))[-1] == 16 * GLOBAL_BATCH  # the first check after it
    assert outcome(folder)["state"] == "failed"
    assert saved(folder) == [10 * GLOBAL_BATCH]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system."""
    with mounted_disk(tmp_path / "disk", "20m") as disk:
        yield disk


def test_a_run_folder_that_has_become_read_only(small_disk: Path, tiny_recipe: Path) -> None:
    overrides = [f"output={small_disk}"]
    stop = {"do": "send", "number": "SIGTERM", "at": "step", "nth": 12}
    train_with([stop], tiny_recipe, *overrides, expect=75)
    before = contents(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = train_with([], tiny_recipe, *overrides, expect=1)
    error = the_error(done)
    assert error.startswith(f"{small_disk}/tiny/generations: this start of the run cannot be recorded: ")
    assert "Read-only file system" in error
    assert contents(small_disk) == before


@pytest.mark.parametrize(
    ("package", "override", "says"),
    [
        ("deepspeed", "engine=deepspeed", "run `pip install 'pomscale[deepspeed]'`, or use engine: fsdp2"),
        ("torchao", "compute.float8=true", "compute.float8: needs torchao: pip install 'pomscale[float8]'"),
    ],
)
def test_a_package_that_is_missing_is_asked_for_where_it_is_needed(
    package: str, override: str, says: str, tiny_recipe: Path
) -> None:
    folder = folder_of(tiny_recipe)
    write_outcome(folder, 0, 0, "stopped")  # of an earlier start: it must not stand for this one
    done = train_with([{"missing": package}], tiny_recipe, override, expect=2)
    assert says in the_error(done)
    assert outcome(folder)["state"] == "failed"
    assert outcome(folder)["incarnation"] == 1


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_kills_at_fifty_random_moments(digits: Path, tiny_recipe: Path, asynchronous: str) -> None:
    """All processes are killed, the launcher too. Saves take most of the time, so most kills fall into one."""
    num_kills, steps_between = 50, 8
    short = ["schedule={}", f"training.total_samples={(num_kills + 3) * steps_between * GLOBAL_BATCH}"]
    train(tiny_recipe, *short, "name=undisturbed", num_processes=2)
    overrides = [*short, f"checkpoint.every_samples={GLOBAL_BATCH}", f"checkpoint.asynchronous={asynchronous}"]
    folder, draws = folder_of(tiny_recipe), random.Random(0)
    for number in range(num_kills):
        # Beyond what is logged already, or it would be killed before it trains.
        earliest = samples_seen(folder) + GLOBAL_BATCH
        moment = max((number * steps_between + draws.randrange(steps_between)) * GLOBAL_BATCH, earliest)
        start_and_signal(tiny_recipe, *overrides, after_samples=moment, number=signal.SIGKILL, num_processes=2)
    train(tiny_recipe, *overrides, num_processes=2)
    assert_same_run(folder, tiny_recipe.parent / "runs" / "undisturbed")
    assert outcome(folder)["incarnation"] == num_kills + 1
