"""`pomscale sample --vbench`: the videos that VBench measures, under the names by which it finds them.

DIR/videos/          PROMPT-0.mp4 to PROMPT-4.mp4 of every prompt, and nothing else: VBench's --videos_path
DIR/unfinished/      a video that is being made, by every process that makes one
DIR/manifest.json    what made the videos, and the seed of each
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pomscale.config.schema import SamplerName
from pomscale.errors import InputError, PomscaleError
from pomscale.evaluation.vbench_suite import VIDEOS, Video, check, claim, list_videos, read_prompts
from pomscale.files import make_folder, sync_folder
from pomscale.filming import film, num_latent_frames
from pomscale.monitoring.text import format_duration
from pomscale.pretrained import PretrainedVDiPoM, load_pretrained
from pomscale.run_folder import versions
from pomscale.weights import open_weights

UNFINISHED = "unfinished"

_TELL_EVERY_S = 30.0


@dataclass(frozen=True)
class SuiteReport:
    """What one task has done, and how much of the whole is there now."""

    folder: Path
    num_made: int
    num_there: int
    num_videos: int

    def __str__(self) -> str:
        state = f"{self.num_made:,} made now, {self.num_there:,} of {self.num_videos:,} are there"
        if self.num_there < self.num_videos:
            return f"{self.folder}: {state}; run the same command to make those that are missing"
        return f"{self.folder}: {state}; give VBench --videos_path {self.folder / VIDEOS}"


def film_suite(
    path: Path,
    prompts_path: Path,
    folder: Path,
    *,
    num: int | None,
    seed: int,
    num_frames: int | None,
    sampler: SamplerName | None,
    steps: int | None,
    guidance: float | None,
    weights: str,
    device: str,
    codec_path: str | None,
    text_path: str | None,
    task: tuple[int, int] = (0, 1),
) -> SuiteReport:
    """Make the videos of `prompts_path` that are not in `folder` yet, by the model at `path`.

    task (index, count): every count-th of them, so that several processes share the work. Stopped at any moment, also
    by a kill, it goes on when it is called again. num: videos of a prompt; None = as VBench asks. num_frames (pixel
    frames), sampler, steps and guidance: None = as the model's recipe says.
    Raises InputError for prompts that cannot be read or cannot name a file, for a model that makes no clips, and for a
    folder whose videos were made in another way; PomscaleError if a video cannot be written.
    """
    prompts = read_prompts(prompts_path, num)
    source = open_weights(path)
    card = source.card
    if card.model.kind != "video":
        raise InputError(f"{path}: this model makes pictures; VBench measures videos")
    videos = list_videos(prompts, seed)
    defaults = card.sampling
    sampling = {
        "num_frames": num_frames,
        "sampler": sampler or defaults.sampler,
        "steps": steps or defaults.num_steps,
        "guidance": defaults.guidance if guidance is None else guidance,
        "seed": seed,
    }
    provenance = {key: value for key, value in source.provenance.items() if key != "data"}
    made_by = {
        "model": {**provenance, "weights": source.resolve(weights)},
        "sampling": sampling,
        "videos": {video.name: video.seed for video in videos},
    }
    for inner in (VIDEOS, UNFINISHED):
        make_folder(folder / inner)
    check(folder, made_by)
    index, count = task
    due = [video for video in videos[index::count] if not (folder / VIDEOS / video.name).exists()]
    if due:
        # source.folder and not path: a run that goes on may have a newer checkpoint by now.
        model = load_pretrained(
            source.folder, weights=weights, device=device, codec_path=codec_path, text_path=text_path
        )
        assert isinstance(model, PretrainedVDiPoM)
        # What can be wrong is noticed before the folder is given to these options.
        num_latent_frames(model, num_frames)
        _ = model.text_encoder
        claim(folder, made_by, {"prompts": str(prompts_path.resolve()), "fps": card.fps, "versions": versions()})
        with _Progress(len(due)) as progress:
            for video in due:
                _make(model, video, folder, sampling)
                progress.advance()
    num_there = sum((folder / VIDEOS / video.name).exists() for video in videos)
    if num_there == len(videos):
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # what killed processes have left
    return SuiteReport(folder, len(due), num_there, len(videos))


def _make(model: PretrainedVDiPoM, video: Video, folder: Path, sampling: Mapping[str, Any]) -> None:
    """The video, whole and on disk under its name; or nothing of that name."""
    with tempfile.TemporaryDirectory(dir=folder / UNFINISHED, ignore_cleanup_errors=True) as own:
        unfinished = Path(own) / "video.mp4"
        film(
            model,
            video.prompt,
            seed=video.seed,
            out=unfinished,
            num_frames=sampling["num_frames"],
            sampler=sampling["sampler"],
            steps=sampling["steps"],
            guidance=sampling["guidance"],
        )
        target = folder / VIDEOS / video.name
        try:
            unfinished.replace(target)
            sync_folder(target.parent)
        except OSError as error:
            raise PomscaleError(f"{target}: cannot be written: {error}; run the same command again to go on") from error


class _Progress:
    """A bar on a terminal; in a log a line now and then. On stderr."""

    def __init__(self, num_videos: int) -> None:
        self._num_videos, self._num_done = num_videos, 0
        self._begun_s = self._told_s = time.monotonic()
        columns = (TextColumn("videos"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._lines = not sys.stderr.isatty()
        self._bar = Progress(*columns, console=Console(stderr=True), disable=self._lines)
        self._task = self._bar.add_task("", total=num_videos)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """One more is there."""
        self._num_done += 1
        self._bar.advance(self._task)
        now_s = time.monotonic()
        is_last = self._num_done == self._num_videos
        if self._lines and (is_last or self._num_done == 1 or now_s - self._told_s >= _TELL_EVERY_S):
            self._told_s = now_s
            each_s = (now_s - self._begun_s) / self._num_done
            left = format_duration(each_s * (self._num_videos - self._num_done))
            done = f"{self._num_done:,} of {self._num_videos:,}"
            print(f"videos: {done}, {each_s:.3g} s each, {left} left", file=sys.stderr, flush=True)
