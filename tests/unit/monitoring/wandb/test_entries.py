"""Rows, artifacts and clips that reach wandb, the real one, offline."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pomscale.config.monitoring import WandbConfig
from pomscale.monitoring.wandb.sink import WandbSink, deliver_without_training
from pomscale.runs.evaluation_log import record
from pomscale.runs.wandb_id import read_wandb_id
from support import wandb_reader
from support.running import mounted_disk
from support.wandb_folder import (
    RECIPE,
    clips_of,
    environment_without_wandb,
    logged_samples,
    open_wandb,
    wandb_files,
    wandb_records,
    wandb_services,
    write_clip,
)


def test_wandb_gets_what_metrics_jsonl_has_and_resumed_runs_continue_it(run: Path) -> None:
    png = run / "samples" / "000000000016.png"
    png.parent.mkdir()
    Image.new("L", (4, 4)).save(png)
    (run / "samples" / "16.mp4").write_bytes(b"not looked into")
    with open_wandb(run, 0, tags=["test"]) as monitor:
        monitor.log(8, {"train/loss": 1.0, "train/grad_norm": 0.5})
        monitor.log_image(16, "samples/grid", png)
        monitor.log_video(16, "samples/clip", run / "samples" / "16.mp4")
        monitor.alert(16, "not finite", "a step is left out", "WARN")
    with open_wandb(run, 1, tags=["test"]) as monitor:
        monitor.log(16, {"train/loss": float("nan")})
    with open_wandb(run, 2, tags=["test"]) as monitor:
        monitor.log(24, {"train/loss": 0.5})

    run_id = (run / "wandb_id.txt").read_text().strip()
    files = wandb_files(run)
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 3
    assert logged_samples(run) == [[8], [16], [24]]
    first, image, video = wandb_reader.read_rows(files[0])
    assert (first["train/loss"], first["train/grad_norm"]) == (1.0, 0.5)
    assert any(key.startswith("samples/grid") for key in image)
    assert any(key.startswith("samples/clip") for key in video)
    assert list((files[0].parent / "files" / "media").rglob("*.mp4"))
    assert str(wandb_reader.read_rows(files[1])[0]["train/loss"]) == "nan"
    jsonl = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in jsonl] == [8, 16, 16, 16, 24]
    assert jsonl[0]["time_unix_s"] == pytest.approx(first["_timestamp"], abs=0.002)

    (described,) = wandb_records(files[0], "run")[:1]
    config = {item.key: json.loads(item.value_json) for item in described.config.update}
    assert (described.run_id, described.display_name, described.run_group) == (run_id, "digits", "digits")
    assert (list(described.tags), config["seed"], config["model"]) == (["test"], 7, {"dim": 64})
    (alert,) = wandb_records(files[0], "alert")
    assert (alert.title, alert.text, alert.level) == ("not finite", "a step is left out", "WARN")


def test_every_metric_is_defined_by_its_whole_name(run: Path) -> None:
    """Where two patterns match a metric, wandb takes either of them, by chance: validation/loss had no minimum then."""
    record(run, 8, {"evaluation/digits-v1.5/accuracy": 0.5}, {})
    names = ["train/loss", "train/grad_norm", "validation/loss", *(f"validation/loss_bin_{n:02d}" for n in range(60))]
    for start in (0, 1):
        with open_wandb(run, start) as monitor:
            for samples, value in ((8, 2.0), (16, 1.0), (24, 3.0)):
                monitor.log(samples, {**dict.fromkeys(names, value), "ranks/slowest_host": f"n{samples}"})
    for file in wandb_files(run):
        metrics = {metric.name: metric for metric in wandb_records(file, "metric")}
        assert not any(metric.glob_name for metric in metrics.values())
        assert {metric.step_metric for name, metric in metrics.items() if name != "samples"} == {"samples"}
        summary = summary_of(file)
        assert summary["samples"] == {"max": 24}
        assert summary["train/grad_norm"] == 3.0
        assert summary["ranks/slowest_host"] == "n24"
        for name in names:
            if name != "train/grad_norm":
                assert summary[name] == {"min": 1.0, "last": 3.0}
    assert summary_of(wandb_files(run)[0])["evaluation/digits-v1.5/accuracy"] == {"min": 0.5, "max": 0.5, "last": 0.5}


def summary_of(file: Path) -> dict[str, Any]:
    """What wandb shows of each metric beside its curve."""
    updates = [item for found in wandb_records(file, "summary") for item in found.update]
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates}


def test_a_group_of_ones_own_choice(run: Path) -> None:
    with open_wandb(run, group="sweep-of-rates") as monitor:
        monitor.log(8, {"train/loss": 1.0})
    assert wandb_records(wandb_files(run)[0], "run")[0].run_group == "sweep-of-rates"


def test_code_and_recipe_are_artifacts_that_lie_in_the_run_folder(run: Path) -> None:
    """Also those of a run whose name is longer than that of an artifact may be, as in a sweep of nine keys."""
    (run / "code.json").write_text("{}")
    (run / "code.diff").write_text("-old\n+new\n")
    (run / "code" / "pomscale" / "training").mkdir(parents=True)
    (run / "code" / "pomscale" / "training" / "run.py").write_text("pass\n")
    # In a process of its own: wandb's data folder is that of the first run of a process.
    program = (
        "import sys; from pathlib import Path\n"
        "from pomscale.config.monitoring import WandbConfig; from pomscale.monitoring.wandb.sink import WandbSink\n"
        "sink = WandbSink(Path(sys.argv[1]), WandbConfig(), 'sweep-lr=1e-4-' + 'x' * 180, {})\n"
        "sink.log(8, {'train/loss': 1.0})\n"
        "sink.close()\n"
    )
    # There is no home directory, as on some nodes.
    environment = {**environment_without_wandb(), "HOME": "/proc/none"}
    subprocess.run([sys.executable, "-c", program, str(run)], env=environment, check=True, capture_output=True)
    recipe, code = wandb_records(wandb_files(run)[0], "artifact")
    for artifact, kind in ((recipe, "recipe"), (code, "code")):
        assert artifact.type == kind
        assert artifact.name.startswith(f"{kind}-sweep-lr-1e-4-xxx")
        assert len(artifact.name) == 128
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


def test_the_id_is_there_before_wandb_is(run: Path) -> None:
    """A checkpoint bears it, also if nothing was logged yet."""
    before = set(wandb_services())
    sink = WandbSink(run, WandbConfig(), "digits", {})
    assert read_wandb_id(run)
    assert set(wandb_services()) <= before
    sink.close()


def test_a_clip_is_in_wandb_at_its_samples_byte_for_byte(run: Path) -> None:
    clips = {samples: write_clip(run / "samples" / f"samples-{samples:012d}.mp4", samples) for samples in (8, 16)}
    with open_wandb(run) as monitor:
        for samples, path in clips.items():
            monitor.log(samples, {"train/loss": 1.0})
            monitor.log_video(samples, "samples/clips", path)
    record(run, 16, {"evaluation/films/accuracy": 1.0}, {"evaluation/films/clip": clips[8]})
    assert deliver_without_training(run) == 1
    training, evaluation = wandb_files(run)
    assert [found[:2] for found in clips_of(training)] == [(8, "samples/clips"), (16, "samples/clips")]
    for samples, _, file in clips_of(training):
        assert (training.parent / "files" / file).read_bytes() == clips[samples].read_bytes()
    ((samples, name, file),) = clips_of(evaluation)
    assert (samples, name) == (16, "evaluation/films/clip")
    assert (evaluation.parent / "files" / file).read_bytes() == clips[8].read_bytes()


def test_broken_media_cost_a_warning_and_nothing_else(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = run / "broken.png"
    broken.write_bytes(b"no picture")
    gone = write_clip(run / "gone.mp4")
    record(
        run,
        8,
        {"evaluation/films/accuracy": 0.5},
        {"evaluation/films/grid": broken, "evaluation/films/clip": gone},
    )
    gone.unlink()  # before anybody can give it to wandb
    with open_wandb(run) as monitor:
        monitor.log(8, {"train/loss": 1.0})
        monitor.log_image(8, "samples/grid", broken)
        monitor.log_video(8, "samples/clips", run / "never.mp4")
        monitor.log(16, {"train/loss": 0.5})
    assert logged_samples(run) == [[8, 16]], "one wandb, that was never torn down"
    assert logged_samples(run, "evaluation/films/accuracy") == [[8]]
    assert clips_of(wandb_files(run)[0]) == []
    assert caplog.text.count("wandb fails; the run goes on") == 1
    assert caplog.text.count("wandb lacks 2 entries") == 1
    for path in (broken, gone):
        assert caplog.text.count(f"{path}: wandb does not take it") == 1


def test_a_clip_that_the_disk_has_no_room_for_costs_that_clip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = write_clip(tmp_path / "clip.mp4", num_frames=32, size=256)
    assert clip.stat().st_size > 1 << 20
    with mounted_disk(tmp_path / "disk", "1m") as run:
        (run / "recipe.yaml").write_text(RECIPE)
        sink = WandbSink(run, WandbConfig(), "digits", {})
        sink.log(8, {"train/loss": 1.0})
        sink.log_video(8, "samples/clips", clip)
        small = write_clip(run / "small.mp4")
        record(run, 16, {"evaluation/films/loss": 0.5}, {"evaluation/films/a": clip, "evaluation/films/b": small})
        for samples in (16, 24):
            sink.log(samples, {"train/loss": 1.0})
        sink.close()
        assert logged_samples(run) == [[8, 16, 24]], "one wandb, that was never torn down"
        assert logged_samples(run, "evaluation/films/loss") == [[16]]
        assert [found[:2] for found in clips_of(wandb_files(run)[0])] == [(16, "evaluation/films/b")]
        assert shutil.disk_usage(run).free > 256 << 10, "nothing has eaten the last room"
    assert caplog.text.count(f"{clip}: no room for wandb's copy of it") == 2
    assert "wandb missed 1 entries; metrics.jsonl has every row" in caplog.text
