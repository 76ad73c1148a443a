"""`pomscale sample` for a model of clips: its options and its messages."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pomscale.base.errors import InputError
from pomscale.cli.arguments import positive
from pomscale.cli.sample.options import OPTIONS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pomscale.diffusion.options import SamplingOptions
    from pomscale.pretrained.load import PretrainedVDiPoM
    from pomscale.sampling.clips import ClipFiles, ClipRequest, WrittenClips


OF_CLIPS = ("frames", "sheet", "start", "save_state", "state")
"""Options of `sample` for models of clips."""

OF_TEXTS = ("prompt", "prompts", "size", "text_path", *OF_CLIPS)
"""Options of `sample` for models of texts, of clips among them."""

# Options of `sample` that the saved state of clips fixes.
_FIXED_BY_STATE = ("prompt", "prompts", "num", "seed", "start", "size", *OPTIONS)


def add_to_sample(sample: argparse.ArgumentParser) -> None:
    """Add the options of `sample` for clips."""
    add_prompts(sample.add_argument_group("texts", "Options for a model that is conditioned on texts."))
    group = sample.add_argument_group("clips", "Options for a model of clips (model.kind: video).")
    add_frames(group)
    group.add_argument(
        "--sheet",
        type=Path,
        metavar="PNG",
        help="PNG that receives a contact sheet: a row per clip, with frames at equal distances",
    )
    group.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="FILE",
        help="Picture or clip that the clips begin with; its frames count among --frames",
    )
    group.add_argument(
        "--save-state",
        type=Path,
        metavar="FILE",
        help="File that receives the state from which --continue continues these clips exactly",
    )
    group.add_argument(
        "--continue",
        dest="state",
        type=Path,
        metavar="FILE",
        help="File of --save-state whose clips are continued for --frames more; --out receives only these frames",
    )


def add_prompts(group: Any) -> None:
    """Add the options that say what a model of texts draws, to a parser or a group of it."""
    group.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="Prompt of the pictures or clips; may be given several times",
    )
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="File with one prompt per line (default: the prompts in the model's recipe)",
    )
    group.add_argument(
        "--size", metavar="HxW", help="Height and width in pixels (default: those of the model's recipe)"
    )
    group.add_argument(
        "--text-path",
        metavar="DIR",
        help="Directory with the text encoder's weights on this machine, if they have moved",
    )


def add_frames(group: Any) -> None:
    """Add the length of the clips that are drawn, to a parser or a group of it."""
    group.add_argument(
        "--frames",
        type=positive,
        metavar="N",
        help="Number of pixel frames of a clip (default: as the model's recipe says)",
    )


def refuse(arguments: argparse.Namespace, names: tuple[str, ...], model: str) -> None:
    """Raise InputError if options of `names` were given, for a model that they are not for."""
    if options := given(arguments, names):
        raise InputError(f"{options}: not for {model}")


def given(arguments: argparse.Namespace, names: tuple[str, ...]) -> str:
    """Return the options among `names` that were given, in the form in which they are typed."""
    typed = {"start": "from", "state": "continue", "num_steps": "steps"}
    defaults = {"seed": 0}
    options = [
        typed.get(name, name.replace("_", "-")) for name in names if getattr(arguments, name) != defaults.get(name)
    ]
    return ", ".join(f"--{option}" for option in options)


def sample(
    arguments: argparse.Namespace, model: PretrainedVDiPoM, options: SamplingOptions, guide: PretrainedVDiPoM | None
) -> int:
    """Run `pomscale sample` for clips."""
    from pomscale.distributed.stop import EXIT_STOPPED, StopRequest
    from pomscale.sampling.clips import ClipFiles, ClipRequest

    if arguments.classes is not None:
        raise InputError(
            f"--classes: not for {arguments.model}, which makes clips: describe with --prompt what they are to show"
        )
    files = ClipFiles(arguments.out or Path("clips.mp4"), arguments.sheet, arguments.npz, arguments.save_state)
    # Clips that are made frame by frame are of use even if they are stopped in the middle.
    stop = StopRequest() if model.config.temporal == "block_causal" else None

    def stopping() -> bool:
        return stop is not None and stop.requested

    try:
        if arguments.state is None:
            defaults = ClipRequest(options, batch=arguments.batch, guide=guide)
            asked, written = _begin(arguments, model, defaults, files, stopping)
        else:
            asked, written = _continue(arguments, model, guide, files, stopping)
    finally:
        if stop is not None:
            stop.restore()
    others = "".join(f", {path}" for path in (files.sheet, files.npz, files.state) if path is not None)
    print(f"wrote {files.out}{others}: {written.num_clips} clips of {written.num_frames} frames")
    if stop is None or written.num_frames == asked:
        return 0
    remedy = f"continue with --continue {files.state}" if files.state else "with --save-state they could be continued"
    print(f"stopped by {stop.signal_name}: {asked - written.num_frames} frames are missing; {remedy}")
    return EXIT_STOPPED


def _begin(
    arguments: argparse.Namespace,
    model: PretrainedVDiPoM,
    request: ClipRequest,
    files: ClipFiles,
    stopping: Callable[[], bool],
) -> tuple[int, WrittenClips]:
    """Make new clips; return the number of frames that was asked for, and the clips that were written."""
    from pomscale.sampling.clips import clip_codec, num_latent_frames, write_clips

    defaults = model.card.sampling
    num_each = arguments.num or defaults.num_each
    prompts = [prompt for prompt in _prompts(arguments, defaults.prompts) for _ in range(num_each)]
    size = None if arguments.size is None else parse_size(arguments.size)
    request = replace(request, num_frames=arguments.frames, size=size)
    seeds = range(arguments.seed, arguments.seed + len(prompts))
    if arguments.start is not None:
        request = replace(request, start=_read_start(arguments.start, model, request))
    asked = clip_codec(model).num_pixel_frames(num_latent_frames(model, request.num_frames))
    return asked, write_clips(model, prompts, seeds, files, request, stopping=stopping, show_progress=True)


def _continue(
    arguments: argparse.Namespace,
    model: PretrainedVDiPoM,
    guide: PretrainedVDiPoM | None,
    files: ClipFiles,
    stopping: Callable[[], bool],
) -> tuple[int, WrittenClips]:
    """Continue saved clips; return as `_begin`."""
    from pomscale.sampling.clips import continue_clips

    if options := given(arguments, _FIXED_BY_STATE):
        raise InputError(f"{options}: not with --continue, whose state fixes that already")
    if arguments.frames is None:
        raise InputError("--continue: give the number of further frames with --frames")
    if arguments.out is None:
        raise InputError("--continue: name the file for them with --out; clips.mp4 may be the clips they continue")
    return arguments.frames, continue_clips(
        model, arguments.state, arguments.frames, files, guide=guide, stopping=stopping, show_progress=True
    )


def _prompts(arguments: argparse.Namespace, defaults: list[str]) -> list[str]:
    prompts = given_prompts(arguments)
    if not (prompts or defaults):
        raise InputError("say with --prompt what the clips are to show; the model's recipe has no sampling.prompts")
    return prompts or defaults


def given_prompts(arguments: argparse.Namespace) -> list[str]:
    """Return the prompts of --prompt and of the file of --prompts; [] = none. InputError if the file has none."""
    prompts = list(arguments.prompt or [])
    if arguments.prompts is not None:
        try:
            lines = arguments.prompts.read_text(encoding="utf-8-sig").splitlines()  # Windows puts a mark first
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts {arguments.prompts}: cannot be read as text: {error}") from error
        of_file = [line.strip() for line in lines if line.strip()]
        if not of_file:
            raise InputError(f"--prompts {arguments.prompts}: holds no prompt; write one per line")
        prompts += of_file
    return prompts


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) of a text such as 240x384. InputError for any other."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise InputError(f"--size {text!r}: give height and width in pixels, such as 240x384")
    return int(match[1]), int(match[2])


def _read_start(path: Path, model: PretrainedVDiPoM, request: ClipRequest) -> Tensor:
    """Read a picture (f = 1), or as much of a clip as the model can begin with: (1 1|3 f H W) in [0, 1]."""
    import torch

    from pomscale.media import PICTURE_EXTENSIONS, UnreadableMediaError, extension
    from pomscale.sampling.clips import clip_codec, pixel_size

    height, width = pixel_size(model, request.size)
    channels = clip_codec(model).num_channels_in
    is_picture = extension(str(path)) in PICTURE_EXTENSIONS
    try:
        with path.open("rb") as file:
            if is_picture:
                from pomscale.media.pictures import decode_picture, fit_picture

                frames = fit_picture(decode_picture(file, channels).image, (height, width), "area")[None]
            else:
                frames = _read_clip(path, file, model, request, (height, width), channels)
    except OSError as error:
        raise InputError(f"--from {path}: cannot be read: {error}") from error
    except UnreadableMediaError as error:
        kinds = "" if is_picture else f" (pictures are {', '.join(PICTURE_EXTENSIONS)}; others are read as clips)"
        raise InputError(f"--from {path}: {error}{kinds}") from error
    return torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None].float() / 255.0


def _read_clip(
    path: Path, file: BinaryIO, model: PretrainedVDiPoM, request: ClipRequest, size: tuple[int, int], channels: int
) -> np.ndarray:
    """Read (f h w channels) uint8 at the model's frame rate, and warn if it is not the whole clip."""
    from pomscale.base.console import warn
    from pomscale.media.clips import decode_clip
    from pomscale.pretrained.card import DEFAULT_FPS
    from pomscale.sampling.clips import start_frames

    numbers, fps = start_frames(model, request.num_frames), model.card.fps or DEFAULT_FPS
    targets = [(number, *size) for number in numbers]
    clip = decode_clip(file, targets, fps, "area", channels, keep_incomplete=True)
    if clip.info["incomplete"]:
        warn(f"--from {path}: has {clip.info['incomplete']}; the clips continue what precedes that")
    num_taken, seconds = len(clip.frames), clip.info["duration_s"]
    num_there = num_taken if seconds is None else int(seconds * fps + 0.05)  # the header rounds to milliseconds
    if num_taken < min(num_there, numbers[-1]):  # all of numbers[-1] is an error of its own
        warn(
            f"--from {path}: the clips continue its first {num_taken} of {num_there} frames (at {fps:g} fps), since "
            f"the codec takes {numbers[1] - numbers[0]} at a time; cut the clip where they are to continue it"
        )
    return clip.frames
