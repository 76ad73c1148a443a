"""`pomscale sample --vbench`: the videos that VBench measures, under the names by which it finds them.

DIR/videos/          PROMPT-0.mp4 to PROMPT-4.mp4 of every prompt, and nothing else: VBench's --videos_path
DIR/unfinished/      videos that processes are writing now
DIR/manifest.json    the model and the options that made the videos, and the seed of each
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pomscale.base.condition import Text
from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import make_folder, sync_folder
from pomscale.base.shared_progress import SharedProgress
from pomscale.diffusion.options import SamplingChanges, SamplingOptions
from pomscale.pretrained.load import PretrainedVDiPoM, load_pretrained
from pomscale.pretrained.weights import TrainedWeights, open_weights
from pomscale.runs.code_state import versions
from pomscale.sampling.clips import ClipFiles, ClipRequest, clip_codec, num_latent_frames, write_clips
from pomscale.sampling.guides import check_clip_guide
from pomscale.sampling.prompts import embed_prompts
from pomscale.sampling.vbench_suite import VIDEOS, Video, check, claim, list_videos, read_prompts

UNFINISHED = "unfinished"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The model that makes the videos, and the machine's device and weights to use with it; see `load_pretrained`.

    guide: A weaker model for autoguidance; see `pomscale.sample`.
    """

    path: Path
    weights: str = "ema"
    device: str = "auto"
    codec_path: str | None = None
    text_path: str | None = None
    guide: Path | None = None

    def load(self, weights: TrainedWeights) -> PretrainedVDiPoM:
        """Load the model of `weights`, even if `path` is a run that has saved a newer checkpoint by now."""
        model = load_pretrained(
            weights.folder,
            weights=self.weights,
            device=self.device,
            codec_path=self.codec_path,
            text_path=self.text_path,
        )
        assert isinstance(model, PretrainedVDiPoM)
        return model

    def load_guide(
        self, weights: TrainedWeights, model: PretrainedVDiPoM, options: SamplingOptions
    ) -> PretrainedVDiPoM:
        """Load the guide of `weights`. InputError if the model cannot have it."""
        guide = load_pretrained(weights.folder, device=self.device)
        if not isinstance(guide, PretrainedVDiPoM):
            raise InputError(f"--guide {self.guide}: this model makes pictures, and {self.path} makes clips")
        check_clip_guide(model, guide, options)
        return guide


@dataclass(frozen=True, slots=True)
class SuiteRequest:
    """The videos of a suite.

    Attributes:
        prompts: Text file with a prompt per line, or VBench_full_info.json.
        num: Videos of a prompt; None = as VBench asks.
        seed: Seed of the suite; each video has a seed of its own.
        num_frames: Frames of a video; None = as the model's recipe says.
        changes: Options of sampling that differ from the recipe's.
    """

    prompts: Path
    num: int | None
    seed: int
    num_frames: int | None
    changes: SamplingChanges

    def recorded(self, options: SamplingOptions) -> dict[str, Any]:
        """Return the entry "sampling" of the manifest: of newer options only those that are not at their defaults."""
        always, defaults = ("sampler", "steps", "guidance"), SamplingOptions().settings()
        settings = options.settings()
        chosen = {name: value for name, value in settings.items() if name in always or value != defaults[name]}
        return {"num_frames": self.num_frames, **chosen, "seed": self.seed}


@dataclass(frozen=True)
class SuiteReport:
    """Numbers of videos: made by this task, existing now, and in the whole suite."""

    folder: Path
    num_made: int
    num_there: int
    num_videos: int

    def __str__(self) -> str:
        state = f"{self.num_made:,} made now, {self.num_there:,} of {self.num_videos:,} are there"
        if self.num_there < self.num_videos:
            return f"{self.folder}: {state}; run the same command to make those that are missing"
        return f"{self.folder}: {state}; give VBench --videos_path {self.folder / VIDEOS}"


def write_suite(
    source: ModelSource, suite: SuiteRequest, folder: Path, *, task: tuple[int, int] = (0, 1)
) -> SuiteReport:
    """Make the videos of a suite that `folder` does not have yet.

    After a stop at any moment, also by a kill, the same call makes the videos that are missing.

    Args:
        source: The model.
        suite: The videos.
        folder: The folder of the suite.
        task: (index, count) = every count-th video from `index` on, so that several processes share the work.

    Returns:
        The numbers of videos that were made and that exist.

    Raises:
        InputError: The prompts cannot be read or cannot name a file, the model makes no clips or cannot have this
            guide, or the videos in the folder were made in another way.
        PomscaleError: A video cannot be written.
    """
    videos = list_videos(read_prompts(suite.prompts, suite.num), suite.seed)
    weights = open_weights(source.path)
    if weights.card.model.kind != "video":
        raise InputError(f"{source.path}: this model makes pictures; VBench measures videos")
    of_guide = None if source.guide is None else open_weights(source.guide)
    options = SamplingOptions.from_recipe(weights.card.sampling, **suite.changes)
    made_by = {
        "model": _recorded_model(weights, source.weights),
        "sampling": suite.recorded(options),
        "videos": {video.name: video.seed for video in videos},
    }
    if of_guide is not None:
        made_by["sampling"]["guide"] = _recorded_model(of_guide, "ema")
    for inner in (VIDEOS, UNFINISHED):
        make_folder(folder / inner)
    check(folder, made_by)
    index, count = task
    due = [video for video in videos[index::count] if not (folder / VIDEOS / video.name).exists()]
    names = {video.name for video in videos}
    if due:
        # Wrong options and missing weights are noticed before the folder is claimed for these options.
        model = source.load(weights)
        guide = None if of_guide is None else source.load_guide(of_guide, model, options)
        num_latent_frames(model, suite.num_frames)
        _ = model.text_encoder, clip_codec(model)
        more = {"prompts": str(suite.prompts.resolve()), "fps": weights.card.fps, "versions": versions()}
        claim(folder, made_by, more)
        request = ClipRequest(options, num_frames=suite.num_frames, guide=guide)
        with SharedProgress("videos", len(videos), lambda: _num_there(folder, names), count) as progress:
            _make_videos(model, due, folder, request, progress)
    num_there = _num_there(folder, names)
    if num_there == len(videos):
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # left by processes that were killed
    return SuiteReport(folder, len(due), num_there, len(videos))


def _num_there(folder: Path, names: set[str]) -> int:
    return len(names & set(os.listdir(folder / VIDEOS)))


def _recorded_model(weights: TrainedWeights, name: str) -> dict[str, Any]:
    """Return what the manifest says of a model: where its weights come from, and which set of them."""
    provenance = {key: value for key, value in weights.provenance.items() if key != "data"}
    return {**provenance, "weights": weights.resolve(name)}


def _make_videos(
    model: PretrainedVDiPoM, videos: list[Video], folder: Path, request: ClipRequest, progress: SharedProgress
) -> None:
    """Make the videos prompt by prompt, so that each prompt is encoded once."""
    for prompt, of_prompt in groupby(videos, key=lambda video: video.prompt):
        text = embed_prompts(model.text_encoder, [prompt])
        for video in of_prompt:
            _make_video(model, video, text, folder, request)
            progress.advance()
            progress.end_part()


def _make_video(model: PretrainedVDiPoM, video: Video, text: Text, folder: Path, request: ClipRequest) -> None:
    """Make the video as a whole file on disk under its name, or no file of that name."""
    with tempfile.TemporaryDirectory(dir=folder / UNFINISHED, ignore_cleanup_errors=True) as own:
        unfinished = Path(own) / "video.mp4"
        write_clips(model, [video.prompt], [video.seed], ClipFiles(unfinished), request, text=text)
        target = folder / VIDEOS / video.name
        try:
            unfinished.replace(target)
            sync_folder(target.parent)
        except OSError as error:
            raise PomscaleError(
                f"{target}: cannot be written: {error}; run the same command again to continue"
            ) from error
