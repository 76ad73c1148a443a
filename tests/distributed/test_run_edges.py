"""Runs at their edges: stopped before the first step, begun from what is gone by now, cut off between two files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pomscale.training.build
from pomscale.base.errors import InputError, PomscaleError
from pomscale.checkpoint.store import complete_checkpoints, find_checkpoint, read_meta
from pomscale.config.load import load_train_recipe
from pomscale.config.train import TrainRecipe
from pomscale.data.loader import MicroBatch
from pomscale.distributed.stop import EXIT_STOPPED
from pomscale.runs.ledger import goodput
from pomscale.runs.metric_names import describe
from pomscale.shards.schema import TextInfo
from pomscale.training.loss import TrainBatch
from pomscale.training.run import train as train_here
from support.forking import ENVIRONMENT
from support.running import (
    GLOBAL_BATCH,
    TIMEOUT_S,
    checkpoint_samples,
    outcome,
    rows,
    run,
    started,
    train_command,
)

STEP = GLOBAL_BATCH
SHORT = ("schedule={}", "faults.preflight=false", f"checkpoint={{every_samples: {2 * STEP}, keep_last: 9}}")


def train(recipe: Path, *overrides: str, steps: int = 4) -> int:
    """In this process."""
    total = f"training.total_samples={steps * STEP}"
    return train_here(load_train_recipe(recipe, [*SHORT, total, *overrides]))


def samples_of(folders: Path) -> list[int]:
    return [int(folder.name.removeprefix("samples-")) for folder in complete_checkpoints(folders)]


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_who_waits_for_other_ranks_obeys_at_once(tiny_recipe: Path, number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as first:  # it answers nothing
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(first.getsockname()[1])}
        environment = {**ENVIRONMENT, "RANK": "1", "WORLD_SIZE": "2", **where}
        with started(train_command(tiny_recipe), env=environment, stderr=subprocess.PIPE) as process:
            connection, _ = first.accept()
            process.send_signal(number)
            _, err = process.communicate(timeout=TIMEOUT_S)
            connection.close()
    assert process.returncode == EXIT_STOPPED
    assert f"{number.name}: stopped before the work began; run the same command again" in err
    assert not (tiny_recipe.parent / "runs").exists()


def test_a_stop_during_the_start_up_takes_no_step(
    tiny_recipe: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_recipe.parent / "runs" / "tiny"
    validation = f"validation={{path: {digits}/latents/heldout, every_samples: {2 * STEP}, num_samples: 8}}"

    def asked_meanwhile(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return open_events(*arguments)

    open_events = pomscale.training.build.open_events
    assert train(tiny_recipe, validation, steps=2) == 0
    before = len(rows(folder))
    (folder / "outcome.json").unlink()  # as if it had been killed in its last validation
    with monkeypatch.context() as patch:
        patch.setattr(pomscale.training.build, "open_events", asked_meanwhile)
        assert train(tiny_recipe, validation) == EXIT_STOPPED
        assert checkpoint_samples(folder) == 2 * STEP
        assert len(rows(folder)) == before  # not even the validation of these samples
        assert outcome(folder)["state"] == "stopped"
        # At the end there is no later: what belongs to the end is done.
        assert train(tiny_recipe, validation, steps=2) == 0
    assert "validation/loss" in rows(folder)[-1]
    assert outcome(folder)["state"] == "finished"
    stops = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if "stop_" in line]
    assert [stop["signal"] for stop in stops] == ["SIGUSR1"]
    assert all(describe(name) for row in rows(folder) for name in row if "/" in name)


def test_a_stop_in_a_first_step_that_is_left_out(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_recipe.parent / "runs" / "tiny"
    draw_batch, share_of_loss = pomscale.training.build.draw_batch, pomscale.training.build.share_of_loss

    def with_nans(recipe: TrainRecipe, batch: MicroBatch, texts: TextInfo | None) -> TrainBatch:
        drawn = draw_batch(recipe, batch, texts)
        drawn.weights[batch.positions // STEP % 3 == 0] *= float("nan")
        return drawn

    def asked_meanwhile(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return share_of_loss(*arguments)

    rarely = (f"monitoring.every_samples={4 * STEP}", f"schedule.warmup_samples={4 * STEP}")
    monkeypatch.setattr(pomscale.training.build, "draw_batch", with_nans)
    with monkeypatch.context() as patch:
        patch.setattr(pomscale.training.build, "share_of_loss", asked_meanwhile)
        assert train(tiny_recipe, *rarely) == EXIT_STOPPED
    (row,) = rows(folder)
    assert row["samples"] == row["train/learning_rate"] == 0
    assert outcome(folder)["samples"] == 0
    assert train(tiny_recipe, *rarely) == 0
    meta = read_meta(find_checkpoint(folder))
    assert (meta["samples"], meta["position"]) == (4 * STEP, 6 * STEP)
    assert meta["skipped"] == [[0, STEP], [3 * STEP, 4 * STEP]]
    balance = goodput(folder)
    assert balance is not None
    assert balance.seconds["lost"] > 0  # the second step that was left out; the first counts as compilation


def test_the_ledger_tells_of_a_stop_that_another_rank_was_asked_for(tiny_recipe: Path) -> None:
    asked = {"do": "send", "number": "SIGUSR1", "at": "step", "nth": 3, "rank": 1}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = Path(__file__).with_name("faulty_train.py")
    run([sys.executable, *launcher, str(worker), json.dumps([asked]), str(tiny_recipe), *SHORT], expect=1)
    folder = tiny_recipe.parent / "runs" / "tiny"
    assert outcome(folder)["samples"] == checkpoint_samples(folder) == 3 * STEP
    stops = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if "stop_" in line]
    assert [stop["signal"] for stop in stops] == ["at another rank"]


def test_a_run_goes_on_without_what_it_was_fine_tuned_from(tiny_recipe: Path) -> None:
    runs = tiny_recipe.parent / "runs"
    train(tiny_recipe, "name=before", steps=2)
    begin = ("name=tuned", f"init_from={{path: {runs}/before}}")
    train(tiny_recipe, *begin, steps=2)
    shutil.rmtree(runs / "before")
    assert train(tiny_recipe, *begin) == 0
    assert checkpoint_samples(runs / "tuned") == 4 * STEP
    with pytest.raises(InputError, match="before"):
        train(tiny_recipe, "name=anew", begin[1])
    assert not (runs / "anew").exists()

    # Not in silence from random weights, either.
    for checkpoint in complete_checkpoints(runs / "tuned" / "checkpoints"):
        (shard,) = checkpoint.glob("*.distcp")
        shard.write_bytes(b"")
    with pytest.raises(PomscaleError, match="all of its checkpoints are damaged"):
        train(tiny_recipe, *begin, steps=6)


def test_a_damaged_checkpoint_json_costs_one_checkpoint(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_recipe.parent / "runs" / "tiny"
    train(tiny_recipe)
    path = complete_checkpoints(folder / "checkpoints")[-1] / "checkpoint.json"
    path.write_bytes(path.read_bytes()[:-1])
    assert train(tiny_recipe, steps=6) == 0
    assert "DAMAGED" in capsys.readouterr().err
    assert json.loads((folder / "incarnations.jsonl").read_text().splitlines()[-1])["start_samples"] == 2 * STEP
    assert samples_of(folder / "checkpoints") == [2 * STEP, 4 * STEP, 6 * STEP]


def test_a_snapshot_that_a_kill_has_cut_off_is_made_again_and_there_is_one_at_the_end(tiny_recipe: Path) -> None:
    post_hoc = f"ema.post_hoc={{every_samples: {2 * STEP}}}"
    snapshots = tiny_recipe.parent / "runs" / "tiny" / "ema"
    train(tiny_recipe, post_hoc, steps=2)
    (tiny_recipe.parent / "runs" / "tiny" / "outcome.json").unlink()
    for snapshot in complete_checkpoints(snapshots):
        shutil.rmtree(snapshot)
    train(tiny_recipe, post_hoc, steps=2)
    assert samples_of(snapshots) == [2 * STEP]
    train(tiny_recipe, post_hoc, steps=5)
    assert samples_of(snapshots) == [2 * STEP, 4 * STEP, 5 * STEP]
