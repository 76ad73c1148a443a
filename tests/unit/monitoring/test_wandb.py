"""wandb, the real one: offline, and online at a server on this machine that hangs or goes away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import wandb
from google.protobuf.message import DecodeError
from PIL import Image

from pomscale.base.errors import InputError
from pomscale.config.monitoring import MonitoringConfig, WandbConfig
from pomscale.monitoring import monitor as monitor_module
from pomscale.monitoring.monitor import Monitor, open_monitor
from pomscale.monitoring.wandb import run as wandb_run
from pomscale.monitoring.wandb import sink as wandb_sink
from pomscale.monitoring.wandb.run import WandbLock, read_wandb_id
from pomscale.monitoring.wandb.sink import WandbSink, deliver_without_training
from pomscale.runs.evaluation_log import record
from support import wandb_reader
from support.running import mounted_disk, wait_until
from support.wandb_server import KEY, wandb_server

RECIPE = """
kind: train
name: digits
codec: {name: pixel, channels: 1}
data: {path: nowhere}
model: {latent_shape: [4, 4, 4], num_classes: 10, dim: 32, depth: 2}
training: {total_samples: 64, global_batch: 8}
checkpoint: {every_samples: 32}
"""


@pytest.fixture(autouse=True)
def own_wandb() -> Iterator[None]:
    """A service process of its own for every test: some kill it."""
    yield
    with suppress(ConnectionError):  # it was killed
        wandb.teardown()


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """On a busy machine wandb's process takes many seconds to start and to end, which is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (monitor_module, wandb_sink):
            patch.setattr(module, "CLOSE_TIMEOUT_S", 120.0)
        patch.setattr(wandb_run, "INIT_TIMEOUT_S", 90.0)
        patch.setenv("WANDB__SERVICE_WAIT", "90")
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def _open(run: Path, incarnation: int = 0, **config: Any) -> Monitor:
    return open_monitor(
        run,
        MonitoringConfig(wandb=WandbConfig.model_validate(config)),
        run_name="digits",
        recipe_dump={"seed": 7, "model": {"dim": 64}},
        total_samples=64,
        start=incarnation,
    )


def _files(run: Path) -> list[Path]:
    """In the order in which they were begun."""
    return sorted((run / "wandb").glob("*run-*/*.wandb"), key=lambda path: path.parent.name.split("run-")[1])


def _rows(run: Path, key: str = "train/loss") -> list[list[int]]:
    """Per file: the samples of the rows that have a metric."""
    return [[row["samples"] for row in wandb_reader.read_rows(path) if key in row] for path in _files(run)]


def _wait_until(is_so: Callable[[], bool]) -> None:
    def is_so_and_whole() -> bool:
        with suppress(DecodeError):  # of a record that is just being written
            return is_so()
        return False

    wait_until(is_so_and_whole, timeout_s=90)


def _records(path: Path, kind: str) -> list[Any]:
    return [getattr(found, kind) for found in wandb_reader.read_records(path) if found.HasField(kind)]


def _service() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.name() == "wandb-core"]


# --- what wandb gets -----------------------------------------------------------------------------------------------


def test_wandb_gets_what_metrics_jsonl_has_and_resumed_runs_continue_it(run: Path) -> None:
    png = run / "samples" / "000000000016.png"
    png.parent.mkdir()
    Image.new("L", (4, 4)).save(png)
    (run / "samples" / "16.mp4").write_bytes(b"not looked into")
    with _open(run, 0, tags=["test"]) as monitor:
        monitor.log(8, {"train/loss": 1.0, "train/grad_norm": 0.5})
        monitor.log_image(16, "samples/grid", png)
        monitor.log_video(16, "samples/clip", run / "samples" / "16.mp4")
        monitor.alert(16, "not finite", "a step is left out", "WARN")
    with _open(run, 1, tags=["test"]) as monitor:
        monitor.log(16, {"train/loss": float("nan")})
    with _open(run, 2, tags=["test"]) as monitor:
        monitor.log(24, {"train/loss": 0.5})

    run_id = (run / "wandb_id.txt").read_text().strip()
    files = _files(run)
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 3
    assert _rows(run) == [[8], [16], [24]]
    first, image, video = wandb_reader.read_rows(files[0])
    assert (first["train/loss"], first["train/grad_norm"]) == (1.0, 0.5)
    assert any(key.startswith("samples/grid") for key in image)
    assert any(key.startswith("samples/clip") for key in video)
    assert list((files[0].parent / "files" / "media").rglob("*.mp4"))
    assert str(wandb_reader.read_rows(files[1])[0]["train/loss"]) == "nan"
    jsonl = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in jsonl] == [8, 16, 16, 16, 24]
    assert jsonl[0]["time_unix_s"] == pytest.approx(first["_timestamp"], abs=0.002)

    (described,) = _records(files[0], "run")[:1]
    config = {item.key: json.loads(item.value_json) for item in described.config.update}
    assert (described.run_id, described.display_name, described.run_group) == (run_id, "digits", "digits")
    assert (list(described.tags), config["seed"], config["model"]) == (["test"], 7, {"dim": 64})
    (alert,) = _records(files[0], "alert")
    assert (alert.title, alert.text, alert.level) == ("not finite", "a step is left out", "WARN")
    metrics = {metric.name or metric.glob_name: metric for metric in _records(files[0], "metric")}
    assert {metric.step_metric for name, metric in metrics.items() if name != "samples"} == {"samples"}
    assert metrics["train/loss"].summary.min
    assert metrics["samples"].summary.max


def test_a_group_of_ones_own_choice(run: Path) -> None:
    with _open(run, group="sweep-of-rates") as monitor:
        monitor.log(8, {"train/loss": 1.0})
    assert _records(_files(run)[0], "run")[0].run_group == "sweep-of-rates"


def test_code_and_recipe_are_artifacts_that_lie_in_the_run_folder(run: Path) -> None:
    (run / "code.json").write_text("{}")
    (run / "code.diff").write_text("-old\n+new\n")
    (run / "code" / "pomscale" / "training").mkdir(parents=True)
    (run / "code" / "pomscale" / "training" / "run.py").write_text("pass\n")
    # In a process of its own: wandb's data folder is that of the first run of a process.
    program = (
        "import sys; from pathlib import Path\n"
        "from pomscale.config.monitoring import WandbConfig; from pomscale.monitoring.wandb.sink import WandbSink\n"
        "sink = WandbSink(Path(sys.argv[1]), WandbConfig(), 'sweep-lr=1e-4', {})\n"
        "sink.log(8, {'train/loss': 1.0})\n"
        "sink.close()\n"
    )
    # No home: what a node without one, or a full quota, would break.
    environment = {**_without_wandb(), "HOME": "/proc/none"}
    subprocess.run([sys.executable, "-c", program, str(run)], env=environment, check=True, capture_output=True)
    recipe, code = _records(_files(run)[0], "artifact")
    assert (recipe.name, recipe.type) == ("recipe-sweep-lr-1e-4", "recipe")
    assert (code.name, code.type) == ("code-sweep-lr-1e-4", "code")
    assert [entry.path for entry in recipe.manifest.contents] == ["recipe.yaml"]
    assert sorted(entry.path for entry in code.manifest.contents) == [
        "code.diff",
        "code.json",
        "code/pomscale/training/run.py",
    ]
    for entry in (*recipe.manifest.contents, *code.manifest.contents):
        copy = Path(entry.local_path)
        assert copy.is_relative_to(run)
        assert copy.read_bytes() == (run / entry.path).read_bytes()


def _without_wandb() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}


def test_the_id_is_there_before_wandb_is(run: Path) -> None:
    """A checkpoint bears it, also if nothing was logged yet."""
    before = set(_service())
    sink = WandbSink(run, WandbConfig(), "digits", {})
    assert read_wandb_id(run)
    assert set(_service()) <= before
    sink.close()


# --- clips ---------------------------------------------------------------------------------------------------------


def _clip(path: Path, num_frames: int = 8, size: int = 48) -> Path:
    """A real one; its noise cannot be compressed much."""
    make_video = pytest.importorskip("make_video", reason="clips need PyAV: pip install -e '.[video]'")
    path.parent.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (num_frames, size, size, 3), np.uint8)
    return Path(make_video.write_video(path, noise, codec_options={"crf": "10"}))


def _clips(path: Path) -> list[tuple[int, str, str]]:
    """(samples, name, file below files/) of the clips in a wandb file."""
    return [
        (row["samples"], key.removesuffix("._type"), row[f"{key.removesuffix('._type')}.path"])
        for row in wandb_reader.read_rows(path)
        for key, value in row.items()
        if value == "video-file"
    ]


def test_a_clip_is_in_wandb_at_its_samples_byte_for_byte(run: Path) -> None:
    clips = {samples: _clip(run / "samples" / f"samples-{samples:012d}.mp4", samples) for samples in (8, 16)}
    with _open(run) as monitor:
        for samples, path in clips.items():
            monitor.log(samples, {"train/loss": 1.0})
            monitor.log_video(samples, "samples/clips", path)
    record(run, 16, {"evaluation/films/accuracy": 1.0}, {"evaluation/films/clip": clips[8]})
    assert deliver_without_training(run) == 1
    training, evaluation = _files(run)
    assert [found[:2] for found in _clips(training)] == [(8, "samples/clips"), (16, "samples/clips")]
    for samples, _, file in _clips(training):
        assert (training.parent / "files" / file).read_bytes() == clips[samples].read_bytes()
    ((samples, name, file),) = _clips(evaluation)
    assert (samples, name) == (16, "evaluation/films/clip")
    assert (evaluation.parent / "files" / file).read_bytes() == clips[8].read_bytes()


def test_broken_media_cost_a_warning_and_nothing_else(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = run / "broken.png"
    broken.write_bytes(b"no picture")
    gone = _clip(run / "gone.mp4")
    record(
        run,
        8,
        {"evaluation/films/accuracy": 0.5},
        {"evaluation/films/grid": broken, "evaluation/films/clip": gone},
    )
    gone.unlink()  # before anybody can give it to wandb
    with _open(run) as monitor:
        monitor.log(8, {"train/loss": 1.0})
        monitor.log_image(8, "samples/grid", broken)
        monitor.log_video(8, "samples/clips", run / "never.mp4")
        monitor.log(16, {"train/loss": 0.5})
    assert _rows(run) == [[8, 16]], "one wandb, that was never torn down"
    assert _rows(run, "evaluation/films/accuracy") == [[8]]
    assert _clips(_files(run)[0]) == []
    assert caplog.text.count("wandb fails; the run goes on") == 1
    assert caplog.text.count("wandb lacks 2 entries") == 1
    for path in (broken, gone):
        assert caplog.text.count(f"{path}: wandb does not take it") == 1


def test_a_clip_that_the_disk_has_no_room_for_costs_that_clip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = _clip(tmp_path / "clip.mp4", num_frames=32, size=256)
    assert clip.stat().st_size > 1 << 20
    with mounted_disk(tmp_path / "disk", "1m") as run:
        (run / "recipe.yaml").write_text(RECIPE)
        sink = WandbSink(run, WandbConfig(), "digits", {})
        sink.log(8, {"train/loss": 1.0})
        sink.log_video(8, "samples/clips", clip)
        small = _clip(run / "small.mp4")
        record(run, 16, {"evaluation/films/loss": 0.5}, {"evaluation/films/a": clip, "evaluation/films/b": small})
        for samples in (16, 24):
            sink.log(samples, {"train/loss": 1.0})
        sink.close()
        assert _rows(run) == [[8, 16, 24]], "one wandb, that was never torn down"
        assert _rows(run, "evaluation/films/loss") == [[16]]
        assert [found[:2] for found in _clips(_files(run)[0])] == [(16, "evaluation/films/b")]
        assert shutil.disk_usage(run).free > 256 << 10, "nothing has eaten the last room"
    assert caplog.text.count(f"{clip}: no room for wandb's copy of it") == 2
    assert "wandb missed 1 entries; metrics.jsonl has every row" in caplog.text


# --- evaluations ---------------------------------------------------------------------------------------------------


def test_evaluations_reach_wandb_once_at_their_own_samples_over_restarts(run: Path) -> None:
    picture = run / "grid.png"
    Image.new("L", (4, 4)).save(picture)
    with _open(run, 0) as monitor:
        monitor.log(8, {"train/loss": 1.0})
        record(run, 8, {"evaluation/digits/accuracy": 0.5}, {"evaluation/digits/grid": picture})
        monitor.log(16, {"train/loss": 0.5})
        monitor.log(24, {"train/loss": 0.25})
    with _open(run, 1) as monitor:
        monitor.log(32, {"train/loss": 0.125})
        record(run, 16, {"evaluation/digits/accuracy": 0.75})  # after the last row: at the end
    with _open(run, 2) as monitor:
        monitor.log(40, {"train/loss": 0.0625})
    assert _rows(run, "evaluation/digits/accuracy") == [[8], [16], []]
    rows = [row for path in _files(run) for row in wandb_reader.read_rows(path)]
    assert any(key.startswith("evaluation/digits/grid") for row in rows for key in row)
    tables = [json.loads(path.read_text()) for path in sorted((run / "wandb").rglob("*.table.json"))]
    columns = ["samples", "digits/accuracy"]
    assert {(tuple(table["columns"]), len(table["data"])) for table in tables} == {
        (tuple(columns), 1),
        (tuple(columns), 2),
    }
    assert "evaluation" not in (run / "metrics.jsonl").read_text()


def test_without_training_evaluations_go_to_wandb_in_a_session_of_their_own(run: Path) -> None:
    record(run, 8, {"evaluation/digits/accuracy": 0.5})
    assert deliver_without_training(run) == 0  # the run has no wandb run yet
    with _open(run) as monitor:
        monitor.log(8, {"train/loss": 1.0})
    assert deliver_without_training(run) == 0  # training gave it
    record(run, 16, {"evaluation/digits/accuracy": 0.75})
    record(run, 24, {"evaluation/digits/accuracy": 0.875})
    assert deliver_without_training(run) == 2
    assert deliver_without_training(run) == 0
    record(run, 32, {"evaluation/digits/accuracy": 1.0})
    assert deliver_without_training(run) == 1  # at once: another folder all the same
    assert _rows(run, "evaluation/digits/accuracy") == [[8], [16, 24], [32]]
    assert len({path.name for path in _files(run)}) == 1  # one wandb run
    (run / "recipe.yaml").write_text(RECIPE + "monitoring: {wandb: {mode: disabled}}\n")
    record(run, 40, {"evaluation/digits/accuracy": 1.0})
    assert deliver_without_training(run) == 0


def test_a_wandb_that_refuses_does_not_refuse_the_evaluation(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with _open(run) as monitor:
        monitor.log(8, {"train/loss": 1.0})
    (run / "recipe.yaml").write_text(RECIPE + "monitoring: {wandb: {mode: online}}\n")
    monkeypatch.setenv("HOME", str(run))  # no ~/.netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    record(run, 8, {"evaluation/digits/accuracy": 0.5})
    assert deliver_without_training(run) == 0
    assert "wandb refuses to start" in caplog.text
    monkeypatch.undo()
    (run / "recipe.yaml").write_text(RECIPE)
    assert deliver_without_training(run) == 1  # it stayed for whoever comes by


def test_while_training_is_alive_it_is_training_that_delivers(run: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from pomscale.config.monitoring import WandbConfig; from pomscale.monitoring.wandb.sink import WandbSink\n"
        "sink = WandbSink(Path(sys.argv[1]), WandbConfig(), 'digits', {})\n"
        "sink.log(8, {'train/loss': 1.0})\n"
        "print('alive', flush=True)\n"
        "sys.stdin.readline()\n"
        "sink.log(16, {'train/loss': 1.0})\n"
        "time.sleep(240)\n"
    )
    training = subprocess.Popen(
        [sys.executable, "-c", program, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert training.stdin is not None
    assert training.stdout is not None
    assert training.stdout.readline() == "alive\n"
    record(run, 8, {"evaluation/digits/accuracy": 0.5})
    assert deliver_without_training(run) == 0
    training.stdin.write("\n")
    training.stdin.close()
    _wait_until(lambda: _rows(run) == [[8, 16]])  # with what was given before the second row
    training.kill()
    training.wait()
    time.sleep(wandb_run._NAME_EVERY_S)  # the next one shall have another name
    record(run, 16, {"evaluation/digits/accuracy": 0.75})
    assert deliver_without_training(run) == 1  # the kernel has taken the lock from it
    assert _rows(run, "evaluation/digits/accuracy") == [[8], [16]]


def test_training_waits_for_who_brings_an_evaluation_just_then(run: Path) -> None:
    lock = WandbLock(run)
    assert lock.take()
    with _open(run) as monitor:
        monitor.log(8, {"train/loss": 1.0})
        time.sleep(0.5)
        assert not _files(run)
        lock.release()
        _wait_until(lambda: bool(_files(run)))
        assert not WandbLock(run).take()
    assert _rows(run) == [[8]]
    assert WandbLock(run).take()


# --- what may go wrong ---------------------------------------------------------------------------------------------


def test_a_wandb_that_dies_is_started_again_and_misses_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_sink, "_RETRY_EVERY_S", 1.0)
    sink = WandbSink(run, WandbConfig(), "digits", {})
    sink.log(8, {"train/loss": 1.0})
    for child in psutil.Process().children(recursive=True):
        child.kill()
        child.wait()
    for samples in (16, 24):
        sink.log(samples, {"train/loss": 1.0})
    time.sleep(1.0)
    sink.log(32, {"train/loss": 1.0})
    sink.close()
    before, after = _rows(run)
    assert set(before) | set(after) == {8, 16, 24, 32}
    assert after == [8, 16, 24, 32]  # 8 was on its way when it died
    ours = [record.message.split("(")[0] for record in caplog.records if record.name.startswith("pomscale")]
    assert ours == ["wandb fails "]


def test_a_wandb_that_dies_after_the_last_row_is_started_again_at_the_end(run: Path) -> None:
    sink = WandbSink(run, WandbConfig(), "digits", {})
    sink.log(8, {"train/loss": 1.0})
    for child in psutil.Process().children(recursive=True):
        child.kill()
        child.wait()
    sink.close()
    assert _rows(run)[-1] == [8]


def test_rows_wait_while_the_disk_is_full_and_none_is_missing_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_sink, "_LOOK_FOR_ROOM_EVERY_S", 0.2)
    monkeypatch.setattr(wandb_sink, "_RETRY_EVERY_S", 0.2)
    with mounted_disk(tmp_path / "disk", "2m") as run:
        (run / "recipe.yaml").write_text(RECIPE)
        sink = WandbSink(run, WandbConfig(), "digits", {})
        wide = {f"train/metric_{index}": 0.5 for index in range(50)}
        for samples in range(1, 101):
            sink.log(samples, {"train/loss": 1.0, **wide})
            if samples == 40:
                time.sleep(1.5)  # what was given so far is on disk
                filler = run / "filler"
                with pytest.raises(OSError, match="No space left"):
                    filler.write_bytes(bytes(4 << 20))
            if samples == 80:
                filler.unlink()
                time.sleep(0.3)
            time.sleep(0.01)
        sink.close()
        assert set().union(*_rows(run)) == set(range(1, 101))
        assert caplog.text.count("wandb fails (OSError(28, 'No space left on device')): rows wait") == 1
        assert "missed" not in caplog.text


def test_a_disk_that_stays_full_costs_wandb_its_rows_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with mounted_disk(tmp_path / "disk", "128k") as run:
        monitor = _open(run)
        for samples in (8, 16, 24):
            monitor.log(samples, {"train/loss": 1.0})
        monitor.close()
        assert not _files(run)
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert "wandb missed 3 entries; metrics.jsonl has every row" in caplog.text


def test_what_wandb_refuses_for_good_does_not_hold_up_the_rest(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_sink, "_RETRY_EVERY_S", 0.0)
    sink = WandbSink(run, WandbConfig(), "digits", {})
    sink.log(8, {"train/loss": 1.0})
    sink.log(16, {"train/loss": object()})  # type: ignore[dict-item]
    for samples in (24, 32):
        sink.log(samples, {"train/loss": 1.0})
    sink.close()
    assert set().union(*_rows(run)) >= {8, 24, 32}


def test_a_service_that_hangs_holds_up_neither_rows_nor_the_end(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitor_module, "CLOSE_TIMEOUT_S", 6.0)
    monitor = _open(run)
    monitor.log(1, {"train/loss": 1.0})
    while not _files(run):
        time.sleep(0.05)
    (service,) = _service()
    service.send_signal(signal.SIGSTOP)
    try:
        wide = {f"train/metric_{index}": 0.5 for index in range(200)}
        for samples in range(2, 1000):  # more than a socket takes
            monitor.log(samples, {"train/loss": 1.0, **wide})
        _wait_until(lambda: (run / "metrics.jsonl").read_bytes().count(b"\n") == 999)
        monitor.close()  # the service would never answer
        assert "wandb has not ended within 6 s: what was not sent is in RUN/wandb" in caplog.text
    finally:
        service.send_signal(signal.SIGKILL)
        service.wait()


# --- a server that is away -----------------------------------------------------------------------------------------


def test_wandb_without_a_key_is_an_input_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run))  # no ~/.netrc
    monkeypatch.setenv("NETRC", str(run / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(InputError, match="offline or disabled"):
        WandbSink(run, WandbConfig(mode="online"), "digits", {})


@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_server_away_at_the_start_falls_back_to_offline_under_the_same_id(
    how: str, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    init = wandb_run.WandbRun._init
    waited_s: list[float] = []

    def init_online_in_a_second(self: wandb_run.WandbRun, mode: Any) -> Any:
        with monkeypatch.context() as patch:
            if mode == "online":
                patch.setattr(wandb_run, "INIT_TIMEOUT_S", 1.0)
            start_s = time.perf_counter()
            try:
                return init(self, mode)
            finally:
                waited_s.append(time.perf_counter() - start_s)

    monkeypatch.setattr(wandb_run.WandbRun, "_init", init_online_in_a_second)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url if how == "hangs" else "http://127.0.0.1:9")
        server.hangs = True
        sink = WandbSink(run, WandbConfig(mode="online"), "digits", {})
        sink.log(8, {"train/loss": 1.0})
        sink.close()
    assert waited_s[0] < 60.0, "wandb itself waits for 90 s"
    assert "recording offline" in caplog.text
    (path,) = (run / "wandb").glob(f"offline-run-*/run-{read_wandb_id(run)}.wandb")
    assert wandb_reader.read_rows(path)[0]["train/loss"] == 1.0


PROGRAM = """
import os, sys, time
from pathlib import Path
from pomscale.config.monitoring import MonitoringConfig, WandbConfig
from pomscale.monitoring import monitor as monitor_module
from pomscale.monitoring.wandb import run as wandb_run
from pomscale.monitoring.monitor import open_monitor
wandb_run.INIT_TIMEOUT_S = 120.0
monitor_module.CLOSE_TIMEOUT_S = 4.0
config = MonitoringConfig(wandb=WandbConfig(mode="online"))
monitor = open_monitor(Path(sys.argv[1]), config, run_name="digits", recipe_dump={}, total_samples=64, start=0)
monitor.log(1, {"train/loss": 1.0})
time.sleep(2)
print("open", flush=True)
sys.stdin.readline()
held_s = []
for samples in range(2, 101):
    start_s = time.perf_counter()
    monitor.log(samples, {"train/loss": 1.0})
    held_s.append(time.perf_counter() - start_s)
    time.sleep(0.01)
sys.stdin.readline()
start_s = time.perf_counter()
monitor.close()
print(max(held_s), time.perf_counter() - start_s, flush=True)
os._exit(0)  # as the command line does
"""


@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_server_away_later_leaves_every_row_in_the_folder_and_lets_the_run_end(how: str, run: Path) -> None:
    with wandb_server() as server:
        environment = {**_without_wandb(), "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(run)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert program.stdin is not None
        assert program.stdout is not None
        while program.stdout.readline() != "open\n":
            assert program.poll() is None
        assert "UpsertBucket" in server.requests
        if how == "hangs":
            server.hangs = True
        else:
            server.go_away()
        program.stdin.write("\n")
        program.stdin.flush()
        _wait_until(lambda: _rows(run) == [list(range(1, 101))])  # wandb's process writes them every second
        out, err = program.communicate("\n", timeout=200)
    held_s, close_s = map(float, out.splitlines()[-1].split())
    assert program.returncode == 0
    assert held_s < 20.0, "it waited for the server, which would take minutes"
    assert 3.5 < close_s < 60.0, "wandb itself tries for minutes"
    assert "wandb has not ended within 4 s: what was not sent is in RUN/wandb" in err
    assert _rows(run) == [list(range(1, 101))]
    assert _files(run)[0].parent.name.startswith("run-")
