"""Run folders with a wandb run, for tests: open it, and read back what wandb has written."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from google.protobuf.message import DecodeError

from pomscale.config.monitoring import MonitoringConfig, WandbConfig
from pomscale.monitoring.monitor import Monitor, open_monitor
from support import wandb_reader
from support.running import wait_until

RECIPE = """
kind: train
name: digits
codec: {name: pixel, channels: 1}
data: {path: nowhere}
model: {latent_shape: [4, 4, 4], num_classes: 10, dim: 32, depth: 2}
training: {total_samples: 64, global_batch: 8}
checkpoint: {every_samples: 32}
"""


def open_wandb(run: Path, start: int = 0, **config: Any) -> Monitor:
    return open_monitor(
        run,
        MonitoringConfig(wandb=WandbConfig.model_validate(config)),
        run_name="digits",
        recipe_dump={"seed": 7, "model": {"dim": 64}},
        total_samples=64,
        start=start,
    )


def wandb_files(run: Path) -> list[Path]:
    """Files of wandb in the order in which they were begun."""
    return sorted((run / "wandb").glob("*run-*/*.wandb"), key=lambda path: path.parent.name.split("run-")[1])


def logged_samples(run: Path, key: str = "train/loss") -> list[list[int]]:
    """Samples of the rows that have a metric, file by file."""
    return [[row["samples"] for row in wandb_reader.read_rows(path) if key in row] for path in wandb_files(run)]


def wait_until_written(is_so: Callable[[], bool]) -> None:
    def is_so_and_whole() -> bool:
        with suppress(DecodeError):  # a record is just being written
            return is_so()
        return False

    wait_until(is_so_and_whole, timeout_s=90)


def wandb_records(path: Path, kind: str) -> list[Any]:
    return [getattr(found, kind) for found in wandb_reader.read_records(path) if found.HasField(kind)]


def wandb_services() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.name() == "wandb-core"]


def environment_without_wandb() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}


def write_clip(path: Path, num_frames: int = 8, size: int = 48) -> Path:
    """Write a real clip of noise, which cannot be compressed much."""
    make_video = pytest.importorskip("support.make_video", reason="clips need PyAV: pip install -e '.[video]'")
    path.parent.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (num_frames, size, size, 3), np.uint8)
    return Path(make_video.write_video(path, noise, codec_options={"crf": "10"}))


def clips_of(path: Path) -> list[tuple[int, str, str]]:
    """Return (samples, name, file below files/) of the clips in a wandb file."""
    return [
        (row["samples"], key.removesuffix("._type"), row[f"{key.removesuffix('._type')}.path"])
        for row in wandb_reader.read_rows(path)
        for key, value in row.items()
        if value == "video-file"
    ]
