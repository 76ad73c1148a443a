"""`pomscale sample --vbench`: the videos that VBench measures, under the names by which it finds them.

DIR/videos/          PROMPT-0.mp4 to PROMPT-4.mp4 of every prompt, and nothing else: VBench's --videos_path
DIR/unfinished/      a video that is being made, by every process that makes one
DIR/manifest.json    what made the videos, and the seed of each
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pomscale.base.condition import Text
from pomscale.base.console import Progress
from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import make_folder, sync_folder
from pomscale.config.sampling import SamplerName
from pomscale.pretrained.load import PretrainedVDiPoM, encode_prompts, load_pretrained
from pomscale.pretrained.weights import open_weights
from pomscale.runs.code_state import versions
from pomscale.sampling.clips import clip_codec, film, num_latent_frames
from pomscale.sampling.vbench_suite import VIDEOS, Video, check, claim, list_videos, read_prompts

UNFINISHED = "unfinished"


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
        _ = model.text_encoder, clip_codec(model)
        claim(folder, made_by, {"prompts": str(prompts_path.resolve()), "fps": card.fps, "versions": versions()})
        with Progress("videos", len(due)) as progress:
            for prompt, of_prompt in groupby(due, key=lambda video: video.prompt):
                text = encode_prompts(model, [prompt])
                for video in of_prompt:
                    _make(model, video, text, folder, sampling)
                    progress.advance()
    num_there = sum((folder / VIDEOS / video.name).exists() for video in videos)
    if num_there == len(videos):
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # what killed processes have left
    return SuiteReport(folder, len(due), num_there, len(videos))


def _make(model: PretrainedVDiPoM, video: Video, text: Text, folder: Path, sampling: Mapping[str, Any]) -> None:
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
            text=text,
        )
        target = folder / VIDEOS / video.name
        try:
            unfinished.replace(target)
            sync_folder(target.parent)
        except OSError as error:
            raise PomscaleError(f"{target}: cannot be written: {error}; run the same command again to go on") from error
