"""The video quickstart: its commands work one after another, and as it stands it reaches what it promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pomscale.quickstart.video import NUM_EVALUATED
from support.running import run_tour

av = pytest.importorskip("av")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")


TOUR = """
from pomscale.quickstart import video as tour
run = tour.run
def with_so_many_clips(*words):
    run(*words, *(["--train", "{num_clips}"] if "data_pipelines.demos.moving_digits" in words else []))
tour.run = with_so_many_clips
tour.NUM_EVALUATED = {num_evaluated}
tour.main({overrides})
"""


def tour(folder: Path, *overrides: str, num_clips: int = 3000, num_evaluated: int = NUM_EVALUATED) -> dict[str, Any]:
    """The figures that it found, in a folder of its own. num_clips: to train on; num_evaluated: per caption."""
    main = TOUR.format(num_clips=num_clips, num_evaluated=num_evaluated, overrides=overrides)
    done = run_tour(main, cwd=folder, timeout=1700)
    run_folder = folder / "runs" / "quickstart-video"
    assert (run_folder / "summary.txt").read_text() in done.stdout
    assert (run_folder / "clips.png").stat().st_size > 0
    with av.open(str(run_folder / "clips.mp4")) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    assert len(frames) == 24
    assert np.std(frames[-1]) > 10  # something is to be seen to the end
    figures: dict[str, Any] = json.loads((run_folder / "moving-digits.json").read_text())
    assert figures["num_frames_generated"] == 3 * figures["num_frames_real"] == 24
    assert figures["digit_real"] > 0.95
    assert figures["direction_real"] == 1.0
    return figures


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tour_with_a_training_of_twenty_steps(tmp_path: Path) -> None:
    few = ["training.total_samples=640", "schedule.warmup_samples=0", "schedule.cooldown_samples=0"]
    few += ["sampling.num_steps=4", "validation.num_samples=32"]
    # The evaluation reads 600 of the clips to train on: its figures of real ones are those of the whole tour.
    figures = tour(tmp_path, *few, num_clips=600, num_evaluated=2)
    assert figures["digit_generated"] < 0.6  # a judge that calls noise a digit would prove nothing


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_clips_three_times_as_long_are_what_was_asked_for(tmp_path: Path) -> None:
    figures = tour(tmp_path)
    assert figures["digit_generated"] >= 0.8, figures
    assert figures["direction_generated"] >= 0.9, figures
