"""`pomscale sample` of a model of clips: its options, and what they say."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pomscale.cli.arguments import positive
from pomscale.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pomscale.filming import Take
    from pomscale.pretrained import PretrainedVDiPoM

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
        help="go on with clips of --save-state for --frames more; what is written holds those alone",
    )
    group.add_argument("--text-path", help="folder of the text encoder's weights on this machine, if they have moved")


def refuse(arguments: argparse.Namespace) -> None:
    """InputError for options of clips, for a model of pictures."""
    _refuse(
        arguments, ("prompt", "prompts", "frames", "size", "sheet", "start", "save_state", "state"), "makes pictures"
    )


def sample(arguments: argparse.Namespace, model: PretrainedVDiPoM) -> int:
    """`pomscale sample` of clips."""
    from pomscale.filming import Films, Take, continue_clips, film_clips

    _refuse(arguments, ("classes",), "makes clips: say with --prompt what they are to show")
    defaults = model.card.sampling
    num_each = arguments.num or defaults.num_each
    films = Films(arguments.out or Path("clips.mp4"), arguments.sheet, arguments.npz, arguments.save_state)
    if arguments.state is not None:
        _refuse(arguments, _ANSWERED, "goes on with --continue, which has settled that")
        if arguments.frames is None:
            raise InputError("--continue: say with --frames how many frames more")
        num_clips = continue_clips(model, arguments.state, arguments.frames, films, show_progress=True)
        num_frames = arguments.frames
    else:
        prompts = [prompt for prompt in _prompts(arguments, defaults.prompts) for _ in range(num_each)]
        take = Take(
            num_frames=arguments.frames,
            size=None if arguments.size is None else _size(arguments.size),
            sampler=arguments.sampler,
            steps=arguments.steps,
            guidance=arguments.guidance,
            batch=arguments.batch,
        )
        num_clips = len(prompts)
        seeds = range(arguments.seed, arguments.seed + num_clips)
        start = None if arguments.start is None else _read_start(arguments.start, model, take)
        num_frames = film_clips(model, prompts, seeds, films, take, start=start, show_progress=True)
    others = "".join(f", {path}" for path in (films.sheet, films.npz, films.state) if path is not None)
    print(f"wrote {films.out}{others}: {num_clips} clips of {num_frames} frames")
    return 0


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    options = {"start": "from", "state": "continue", "save_state": "save-state"}
    defaults = {"seed": 0}
    given = [f"--{options.get(name, name)}" for name in names if getattr(arguments, name) != defaults.get(name)]
    if given:
        raise InputError(f"{', '.join(given)}: not for {arguments.model}, which {reason}")


def _prompts(arguments: argparse.Namespace, defaults: list[str]) -> list[str]:
    prompts = list(arguments.prompt or [])
    if arguments.prompts is not None:
        try:
            lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
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

    from data_pipelines.common.media import UnreadableMediaError
    from pomscale.filming import clip_codec, pixel_size

    height, width = pixel_size(model, take.size)
    channels = clip_codec(model).num_channels_in
    try:
        with path.open("rb") as file:
            if path.suffix.lower() in _PICTURES:
                from data_pipelines.images.transform import decode_picture, fit_picture

                frames = fit_picture(decode_picture(file, channels).image, (height, width), "area")[None]
            else:
                frames = _read_clip(file, model, take, (height, width), channels)
    except OSError as error:
        raise InputError(f"--from {path}: cannot be read: {error}") from error
    except UnreadableMediaError as error:
        raise InputError(f"--from {path}: {error}") from error
    return torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None].float() / 255.0


def _read_clip(file: BinaryIO, model: PretrainedVDiPoM, take: Take, size: tuple[int, int], channels: int) -> np.ndarray:
    """(f h w channels) uint8 at the model's frame rate."""
    from data_pipelines.videos.clip import decode_clip
    from pomscale.card import DEFAULT_FPS
    from pomscale.filming import start_frames

    targets = [(number, *size) for number in start_frames(model, take.num_frames)]
    return decode_clip(file, targets, model.card.fps or DEFAULT_FPS, "area", channels).frames
