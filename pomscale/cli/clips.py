"""`pomscale sample` of a model of clips: its options, and what they say."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pomscale.base.errors import InputError
from pomscale.cli.arguments import positive

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pomscale.pretrained.load import PretrainedVDiPoM
    from pomscale.sampling.clips import Filmed, Films, Take

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")

# Options that the saved state of clips already answers.
_ANSWERED = ("prompt", "prompts", "num", "seed", "start", "size", "sampler", "steps", "guidance")


def add_to_sample(sample: argparse.ArgumentParser) -> None:
    """The options of `sample` for clips."""
    group = sample.add_argument_group("clips", "of a model that is told texts (model.kind: video)")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    group.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line (default: the recipe's)")
    group.add_argument(
        "--frames", type=positive, help="frames of a clip, as one sees them (default: as the recipe says)"
    )
    group.add_argument("--size", metavar="HxW", help="height and width in pixels (default: of the training clips)")
    group.add_argument("--sheet", type=Path, metavar="PNG", help="contact sheet: a row per clip, frames evenly spaced")
    group.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="FILE",
        help="a picture that the clips begin with, or a clip that they go on from; counts among --frames",
    )
    group.add_argument(
        "--save-state", type=Path, metavar="FILE", help="all that is needed to go on with these clips, exactly"
    )
    group.add_argument(
        "--continue",
        dest="state",
        type=Path,
        metavar="FILE",
        help="go on with clips of --save-state for --frames more; --out holds those alone",
    )
    group.add_argument("--text-path", help="folder of the text encoder's weights on this machine, if they have moved")


def refuse(arguments: argparse.Namespace) -> None:
    """InputError for options of clips, for a model of pictures."""
    names = ("prompt", "prompts", "frames", "size", "sheet", "start", "save_state", "state", "text_path")
    if options := given(arguments, names):
        raise InputError(f"{options}: not for {arguments.model}, which makes pictures")


def given(arguments: argparse.Namespace, names: tuple[str, ...]) -> str:
    """Those of these options that were given, as one types them."""
    typed = {"start": "from", "state": "continue"}
    defaults = {"seed": 0}
    options = [
        typed.get(name, name.replace("_", "-")) for name in names if getattr(arguments, name) != defaults.get(name)
    ]
    return ", ".join(f"--{option}" for option in options)


def sample(arguments: argparse.Namespace, model: PretrainedVDiPoM) -> int:
    """`pomscale sample` of clips."""
    from pomscale.distributed.stop import EXIT_STOPPED, StopRequest
    from pomscale.sampling.clips import Films

    if arguments.classes is not None:
        raise InputError(
            f"--classes: not for {arguments.model}, which makes clips: say with --prompt what they are to show"
        )
    films = Films(arguments.out or Path("clips.mp4"), arguments.sheet, arguments.npz, arguments.save_state)
    make = _begin if arguments.state is None else _continue
    # Made frame by frame, what is there when it is to stop is worth something.
    stop = StopRequest() if model.config.temporal == "block_causal" else None
    try:
        asked, (num_clips, num_frames) = make(arguments, model, films, lambda: stop is not None and stop.requested)
    finally:
        if stop is not None:
            stop.restore()
    others = "".join(f", {path}" for path in (films.sheet, films.npz, films.state) if path is not None)
    print(f"wrote {films.out}{others}: {num_clips} clips of {num_frames} frames")
    if stop is None or num_frames == asked:
        return 0
    go_on = f"go on with --continue {films.state}" if films.state else "with --save-state they could be gone on with"
    print(f"stopped by {stop.signal_name}: {asked - num_frames} frames are missing; {go_on}")
    return EXIT_STOPPED


def _begin(
    arguments: argparse.Namespace, model: PretrainedVDiPoM, films: Films, stopping: Callable[[], bool]
) -> tuple[int, Filmed]:
    """Frames that were asked for, and what was made."""
    from pomscale.sampling.clips import Take, clip_codec, film_clips, num_latent_frames

    defaults = model.card.sampling
    num_each = arguments.num or defaults.num_each
    prompts = [prompt for prompt in _prompts(arguments, defaults.prompts) for _ in range(num_each)]
    take = Take(
        num_frames=arguments.frames,
        size=None if arguments.size is None else _size(arguments.size),
        sampler=arguments.sampler,
        steps=arguments.steps,
        guidance=arguments.guidance,
        batch=arguments.batch,
    )
    seeds = range(arguments.seed, arguments.seed + len(prompts))
    start = None if arguments.start is None else _read_start(arguments.start, model, take)
    asked = clip_codec(model).num_pixel_frames(num_latent_frames(model, take.num_frames))
    return asked, film_clips(model, prompts, seeds, films, take, start=start, stopping=stopping, show_progress=True)


def _continue(
    arguments: argparse.Namespace, model: PretrainedVDiPoM, films: Films, stopping: Callable[[], bool]
) -> tuple[int, Filmed]:
    """As `_begin`."""
    from pomscale.sampling.clips import continue_clips

    if options := given(arguments, _ANSWERED):
        raise InputError(f"{options}: not with --continue, whose state says that already")
    if arguments.frames is None:
        raise InputError("--continue: say with --frames how many frames more")
    if arguments.out is None:
        raise InputError("--continue: say with --out where they go; clips.mp4 may be what they go on from")
    return arguments.frames, continue_clips(
        model, arguments.state, arguments.frames, films, stopping=stopping, show_progress=True
    )


def _prompts(arguments: argparse.Namespace, defaults: list[str]) -> list[str]:
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
    if not (prompts or defaults):
        raise InputError("say with --prompt what the clips are to show; the model's recipe has no sampling.prompts")
    return prompts or defaults


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise InputError(f"--size {text!r}: give height and width in pixels, such as 240x384")
    return int(match[1]), int(match[2])


def _read_start(path: Path, model: PretrainedVDiPoM, take: Take) -> Tensor:
    """(1 1|3 f H W) in [0, 1]: a picture (f = 1), or as much of a clip as the model can begin with."""
    import torch

    from pomscale.media import UnreadableMediaError
    from pomscale.sampling.clips import clip_codec, pixel_size

    height, width = pixel_size(model, take.size)
    channels = clip_codec(model).num_channels_in
    is_picture = path.suffix.lower() in _PICTURES
    try:
        with path.open("rb") as file:
            if is_picture:
                from pomscale.media.pictures import decode_picture, fit_picture

                frames = fit_picture(decode_picture(file, channels).image, (height, width), "area")[None]
            else:
                frames = _read_clip(path, file, model, take, (height, width), channels)
    except OSError as error:
        raise InputError(f"--from {path}: cannot be read: {error}") from error
    except UnreadableMediaError as error:
        kinds = "" if is_picture else f" (pictures are {', '.join(_PICTURES)}; others are read as clips)"
        raise InputError(f"--from {path}: {error}{kinds}") from error
    return torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None].float() / 255.0


def _read_clip(
    path: Path, file: BinaryIO, model: PretrainedVDiPoM, take: Take, size: tuple[int, int], channels: int
) -> np.ndarray:
    """(f h w channels) uint8 at the model's frame rate. Warns if it is not the whole clip."""
    from pomscale.base.console import warn
    from pomscale.media.clips import decode_clip
    from pomscale.pretrained.card import DEFAULT_FPS
    from pomscale.sampling.clips import start_frames

    numbers, fps = start_frames(model, take.num_frames), model.card.fps or DEFAULT_FPS
    clip = decode_clip(file, [(number, *size) for number in numbers], fps, "area", channels)
    num_taken, seconds = len(clip.frames), clip.info["duration_s"]
    num_there = num_taken if seconds is None else int(seconds * fps + 0.05)  # the header rounds to milliseconds
    if num_taken < min(num_there, numbers[-1]):  # all of numbers[-1] is an error of its own
        warn(
            f"--from {path}: the clips go on from its first {num_taken} of {num_there} frames (at {fps:g} fps), since "
            f"the codec takes {numbers[1] - numbers[0]} at a time; cut it where they are to go on"
        )
    return clip.frames
