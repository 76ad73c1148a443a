"""Evaluations: recorded by any process, counted as the run counts them, described by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pomscale.base.errors import InputError, PomscaleError
from pomscale.monitoring.sinks import JsonlSink
from pomscale.runs.evaluation_log import Delivery, read_evaluations, record
from pomscale.runs.history import read_history
from pomscale.runs.layout import EVALUATIONS_FILE
from pomscale.runs.metric_names import describe, evaluation_name, plain_figure
from pomscale.runs.result_settings import result_key
from support.running import mounted_disk, wait_until

ACCURACY = evaluation_name("digits", "accuracy")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").touch()
    return folder


def _train(run: Path, number: int, start: int, *samples: int) -> None:
    time.sleep(0.01)  # times are in milliseconds
    with (run / "incarnations.jsonl").open("a") as file:
        file.write(json.dumps({"incarnation": number, "start_samples": start}) + "\n")
    sink = JsonlSink(run, number)
    for at in samples:
        sink.log(at, {"train/loss": 1.0 / at})
    sink.close()


def test_what_is_recorded_is_read_back(run: Path) -> None:
    inside, outside = run / "samples" / "a.png", run.parent / "b.mp4"
    inside.parent.mkdir()
    inside.touch()
    outside.touch()
    record(run, 640, {ACCURACY: 0.75, "evaluation/digits/loss": float("nan")}, {"evaluation/digits/grid": inside})
    record(run, 1280, {ACCURACY: 0.875}, {"evaluation/digits/clip": outside})
    first, second = read_evaluations(run)
    assert (first.samples, first.metrics[ACCURACY], str(first.metrics["evaluation/digits/loss"])) == (640, 0.75, "nan")
    assert (first.pictures, second.pictures) == (
        {"evaluation/digits/grid": inside},
        {"evaluation/digits/clip": outside},
    )
    moved = run.rename(run.parent / "moved")
    assert read_evaluations(moved)[0].pictures == {"evaluation/digits/grid": moved / "samples" / "a.png"}


def test_names_say_what_they_are() -> None:
    assert ACCURACY == "evaluation/digits/accuracy"
    assert describe(ACCURACY) == "accuracy of the checkpoint at these samples, measured by evaluation digits"
    assert describe("evaluation/loose") == ""


@pytest.mark.parametrize(
    ("metrics", "picture", "message"),
    [
        ({"train/loss": 1.0}, None, "not the name of an evaluation"),
        ({"evaluation/loose": 1.0}, None, "must be evaluation/NAME/FIGURE"),
        ({"evaluation/a@b/figure": 1.0}, None, "must be evaluation/NAME/FIGURE"),
        ({}, None, "nothing to record"),
        ({ACCURACY: 1.0}, "gone.png", "gone.png: missing"),
        ({ACCURACY: 1.0}, "recipe.yaml", "neither an image nor a clip"),
    ],
)
def test_what_is_no_evaluation_is_refused(
    run: Path, metrics: dict[str, float], picture: str | None, message: str
) -> None:
    pictures = {"evaluation/digits/grid": run / picture} if picture else {}
    with pytest.raises(InputError, match=message):
        record(run, 8, metrics, pictures)
    assert not (run / EVALUATIONS_FILE).exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run folder"):
        record(tmp_path, 8, {ACCURACY: 1.0})


PROGRAM = """
import sys
import time
from pathlib import Path
from pomscale.runs.evaluation_log import record
for samples in range(int(sys.argv[2]), int(sys.argv[3])):
    record(Path(sys.argv[1]), samples, {f"evaluation/{'x' * 1000}/figure": samples})
"""


def test_many_processes_record_at_once_and_every_line_is_whole(run: Path) -> None:
    (run / EVALUATIONS_FILE).write_text('{"samples": 7, "time_un')  # of a node that died
    command = [sys.executable, "-c", PROGRAM, str(run)]
    processes = [subprocess.Popen([*command, str(first), str(first + 200)]) for first in (1000, 2000, 3000)]
    killed = subprocess.Popen([*command, "4000", "1000000"])
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    wait_until(lambda: max(found.samples for found in read_evaluations(run)) > 4000, timeout_s=60)  # it may come late
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    found = [evaluation.samples for evaluation in read_evaluations(run)]
    expected = [*range(1000, 1200), *range(2000, 2200), *range(3000, 3200)]
    assert sorted(samples for samples in found if samples < 4000) == expected
    assert max(found) > 4000
    assert all(len(line) > 1000 for line in (run / EVALUATIONS_FILE).read_text().splitlines()[1:])


def test_a_full_disk_leaves_no_half_line_and_says_so(tmp_path: Path) -> None:
    with mounted_disk(tmp_path / "disk", "128k") as run:
        (run / "recipe.yaml").touch()
        record(run, 8, {ACCURACY: 0.5})
        filler = run / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(1 << 20))
        with pytest.raises(PomscaleError, match=r"evaluations.jsonl: cannot be written: .*; make room"):
            record(run, 16, {f"evaluation/digits/{'x' * 8000}": 0.5})
        filler.unlink()
        record(run, 24, {ACCURACY: 0.75})
        assert [evaluation.samples for evaluation in read_evaluations(run)] == [8, 24]


def test_history_has_them_with_samples_as_the_axis(run: Path) -> None:
    _train(run, 0, 0, 8, 16, 24)
    record(run, 16, {ACCURACY: 0.5})
    record(run, 8, {ACCURACY: 0.25})  # its job took longer
    record(run, 16, {ACCURACY: 0.75})  # measured again: the last one counts
    history = read_history(run)
    assert history.series[ACCURACY] == ([8, 16], [0.25, 0.75])
    assert history.series["train/loss"][0] == [8, 16, 24]
    assert [evaluation.samples for evaluation in history.evaluations] == [16, 8, 16]


FID, STEPS_50, STEPS_25 = evaluation_name("images", "fid"), {"steps": 50}, {"steps": 25}
OTHER = f"evaluation/images@{result_key(STEPS_25)}/fid"


def test_results_of_other_settings_are_another_curve(run: Path) -> None:
    _train(run, 0, 0, 8, 16, 24)
    picture = run / "a.png"
    picture.touch()
    record(run, 16, {FID: 9.0}, settings=STEPS_50 | {"checkpoint": {"samples": 16}})
    record(run, 16, {FID: 7.0}, {"evaluation/images/grid": picture}, settings=STEPS_25)
    record(run, 8, {FID: 12.0}, settings=STEPS_50 | {"checkpoint": {"samples": 8}})
    record(run, 8, {FID: 99.0, ACCURACY: 0.5})  # by a version that kept no settings
    history = read_history(run)
    assert history.series[FID] == ([8, 16], [12.0, 9.0])
    assert history.series[OTHER] == ([16], [7.0])
    assert history.series["evaluation/images@unrecorded/fid"] == ([8], [99.0])
    assert history.series[ACCURACY] == ([8], [0.5])
    assert history.settings == {
        "images": STEPS_50 | {"checkpoint": {"samples": 8}},
        OTHER.split("/")[1]: STEPS_25,
        "images@unrecorded": {},
        "digits": {},
    }
    assert history.evaluations[1].pictures == {OTHER.replace("/fid", "/grid"): picture}
    assert "with other settings" in describe(OTHER)
    assert plain_figure(OTHER) == FID


def test_lines_without_settings_stay_one_curve(run: Path) -> None:
    _train(run, 0, 0, 8, 16)
    row = {"samples": 8, "time_unix_s": 1.0, "metrics": {FID: 9.0}, "pictures": {}}
    (run / EVALUATIONS_FILE).write_text(json.dumps(row) + "\n")
    record(run, 16, {FID: 8.0})
    assert read_history(run).series[FID] == ([8, 16], [9.0, 8.0])


def test_delivery_gives_the_same_names_as_reading_all(run: Path) -> None:
    record(run, 8, {FID: 9.0}, settings=STEPS_50)
    first = Delivery(run)
    ((_, position),) = first.due()
    first.note(position)
    record(run, 16, {FID: 7.0}, settings=STEPS_25)
    for delivery in (first, Delivery(run)):
        assert [list(evaluation.metrics) for evaluation, _ in delivery.due()] == [[OTHER]]


def test_going_back_gives_up_what_was_measured_beyond(run: Path) -> None:
    _train(run, 0, 0, 8, 16, 24)
    record(run, 8, {ACCURACY: 0.25})
    record(run, 24, {ACCURACY: 0.75})
    assert read_history(run).series[ACCURACY] == ([8, 24], [0.25, 0.75])
    _train(run, 1, 8, 16)  # the checkpoint at 24 was damaged
    assert read_history(run).series[ACCURACY] == ([8], [0.25])
    record(run, 16, {ACCURACY: 0.5})
    time.sleep(0.01)
    sink = JsonlSink(run, 1)
    sink.log(8, {"faults/rollbacks": 1})
    sink.close()
    assert read_history(run).series[ACCURACY] == ([8], [0.25])
    time.sleep(0.01)
    record(run, 16, {ACCURACY: 0.625})
    assert read_history(run).series[ACCURACY] == ([8, 16], [0.25, 0.625])


def test_delivery_gives_each_row_once_also_over_restarts(run: Path) -> None:
    assert not Delivery(run).has_more
    for samples in (8, 16, 24):
        record(run, samples, {ACCURACY: 0.5})
    first = Delivery(run)
    due = list(first.due())
    assert [evaluation.samples for evaluation, _ in due] == [8, 16, 24]
    assert not list(first.due())
    first.note(due[1][1])  # and then it is killed
    second = Delivery(run)
    due = list(second.due())
    assert [evaluation.samples for evaluation, _ in due] == [24]
    second.note(due[0][1])
    with (run / EVALUATIONS_FILE).open("ab") as file:
        file.write(b'{"samples": 32')  # just being written
        file.flush()
        assert not list(Delivery(run).due())
        os.ftruncate(file.fileno(), file.tell() - len(b'{"samples": 32'))
    record(run, 40, {ACCURACY: 0.5})
    assert [evaluation.samples for evaluation, _ in second.due()] == [40]
