"""`pomscale sample` for a model of clips: mp4 files, at constant memory where the model makes frame by frame.

"Frames" are pixel frames. A codec decodes each latent frame to one to four of them; these are always called "latent
frames".
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pomscale.base.condition import Text
from pomscale.base.console import track
from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write, check_suffix, make_folder
from pomscale.codecs.base import ClipCodec, ClipDecoder
from pomscale.data.normalize import normalize
from pomscale.diffusion.options import SamplingOptions
from pomscale.media.sheets import ContactSheet, open_clips, to_bytes
from pomscale.pretrained.card import DEFAULT_FPS
from pomscale.pretrained.load import PretrainedVDiPoM
from pomscale.sampling.api import sample_latents
from pomscale.sampling.stream import ClipStream

MP4 = ".mp4"


@dataclass(frozen=True, slots=True)
class ClipFiles:
    """The files that clips are written to; None = not written.

    Attributes:
        out: NAME.mp4 = one file with all clips, a row per prompt; any other name = a folder with one file per clip.
        sheet: PNG with a row per clip, whose frames are evenly spaced in it.
        npz: File for clips (uint8 n f h w c), prompts and seeds; it takes memory for all frames.
        state: File for the state that `continue_clips` needs.
    """

    out: Path
    sheet: Path | None = None
    npz: Path | None = None
    state: Path | None = None

    def make_folders(self) -> None:
        """Make the folders of the files. Raise InputError if a file cannot be written, before any work."""
        if self.out.suffix not in ("", MP4):
            raise InputError(f"--out {self.out}: clips are written to a file {MP4}, or one by one into a folder")
        if not self.out.suffix:
            make_folder(self.out)
        for path in filter(None, (self.out if self.out.suffix else None, self.sheet, self.npz, self.state)):
            make_folder(path.parent)
            if path.is_dir():
                raise InputError(f"{path}: is a folder; name a file")
        if self.sheet is not None:
            check_suffix(self.sheet, ".png")
        if self.npz is not None:
            check_suffix(self.npz, ".npz")

    def mp4s(self, num_clips: int) -> list[tuple[Path, slice]]:
        """Return the mp4 files, each with the clips that it shows."""
        if self.out.suffix:
            return [(self.out, slice(None))]
        return [(self.out / f"{number:04d}{MP4}", slice(number, number + 1)) for number in range(num_clips)]


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """The clips to make, but for their prompts and seeds.

    Attributes:
        options: Options of sampling.
        num_frames: Frames of a clip; None = as the model's recipe says.
        size: (height, width) in pixels; None = that of the training clips.
        start: Frames (1 1|3 f H W) in [0, 1] that every clip begins with, f one of `start_frames`. One frame is a
            picture, which the clips set in motion.
        batch: Most clips at once, for a model that makes all frames at once; it does not change the clips.
        guide: The weaker model of autoguidance.
    """

    options: SamplingOptions
    num_frames: int | None = None
    size: tuple[int, int] | None = None
    start: Tensor | None = None
    batch: int = 64
    guide: PretrainedVDiPoM | None = None


class WrittenClips(NamedTuple):
    """Number of clips, and number of frames of each clip that were written; fewer than asked for after a stop."""

    num_clips: int
    num_frames: int


def write_clips(
    model: PretrainedVDiPoM,
    prompts: Sequence[str],
    seeds: Sequence[int],
    files: ClipFiles,
    request: ClipRequest,
    *,
    text: Text | None = None,
    stopping: Callable[[], bool] = lambda: False,
    show_progress: bool = False,
) -> WrittenClips:
    """Make a clip per prompt and seed, and write them.

    A model with the block-causal mask makes them frame group by frame group, and memory does not grow with their
    length. Other models make all frames at once.

    Args:
        model: The model.
        prompts: One prompt per clip.
        seeds: One seed per clip.
        files: The files to write.
        request: The clips to make.
        text: The embedded prompts, if they are known already.
        stopping: Once it returns True, a model with the block-causal mask makes no more frame groups, and the frames
            made so far become whole files.
        show_progress: Show progress on standard error.

    Returns:
        The numbers of clips and of frames that were written.

    Raises:
        InputError: The request does not fit the model.
        PomscaleError: A file cannot be written.
    """
    files.make_folders()
    codec, patch_frames = clip_codec(model), model.config.patch_frames
    num_latent = num_latent_frames(model, request.num_frames)
    size, known = _latent_size(model, request.size), _known(model, request, len(seeds))
    if known is not None and known.shape[2] >= num_latent:
        raise InputError(
            "--from: the frames given are as many as the clips have, and leave none to make; raise --frames"
        )
    num_groups, num_frames = num_latent // patch_frames, codec.num_pixel_frames(num_latent)
    decoder = codec.decoder(num_latent)
    if files.state is not None:
        decoder.state_dict()  # refused now, and not after hours of work, where the codec continues no clips
    if model.config.temporal == "block_causal":
        stream = ClipStream(
            model,
            text or prompts,
            seeds,
            num_groups=num_groups,
            known=known,
            size=size,
            guide=request.guide,
            **asdict(request.options),
        )
        groups = track(_until(stopping, model, stream, num_groups), "frame groups", num_groups, enabled=show_progress)
        num_frames = _write(model, groups, decoder, prompts, seeds, num_frames, files)
        if files.state is not None:
            stream.save(files.state, decoder.state_dict())
        return WrittenClips(len(seeds), num_frames)
    if files.state is not None:
        raise InputError(
            "--save-state: this model makes all frames at once, so its clips cannot be continued from a state; "
            "train one with model.temporal: block_causal, or continue a clip with --from"
        )
    latents = sample_latents(
        model,
        text or prompts,
        seeds,
        request.options,
        num_frames=num_latent,
        size=size,
        known=known,
        batch=request.batch,
        show_progress=show_progress,
        guide=request.guide,
    )
    groups = track(latents.split(patch_frames, dim=2), "frame groups", num_groups, enabled=show_progress)
    return WrittenClips(len(seeds), _write(model, groups, decoder, prompts, seeds, num_frames, files))


def continue_clips(
    model: PretrainedVDiPoM,
    state: Path,
    num_frames: int,
    files: ClipFiles,
    *,
    guide: PretrainedVDiPoM | None = None,
    stopping: Callable[[], bool] = lambda: False,
    show_progress: bool = False,
) -> WrittenClips:
    """Make the next `num_frames` of clips whose state was saved, exactly as if they had not been interrupted.

    Args:
        model: The model that began the clips.
        state: The file of the state.
        num_frames: Number of further frames.
        files: The files to write; they hold the further frames alone.
        guide: The weaker model that guided the clips so far, if one did.
        stopping: See `write_clips`.
        show_progress: Show progress on standard error.

    Returns:
        The numbers of clips and of frames that were written.

    Raises:
        InputError: The state belongs to another model, or the number of frames does not fit.
        PomscaleError: A file cannot be written.
    """
    files.make_folders()
    stream, carried = ClipStream.resume(model, state, num_groups=None, guide=guide)
    if stream.prompts is None:
        raise InputError(f"{state}: saved without prompts, from a text batch; continue it with ClipStream.resume")
    begun = stream.next_group * model.config.patch_frames
    num_groups = num_latent_frames(model, num_frames, begun) // model.config.patch_frames
    decoder = clip_codec(model).decoder(begun)
    decoder.load_state_dict(carried)
    groups = track(_until(stopping, model, stream, num_groups), "frame groups", num_groups, enabled=show_progress)
    num_frames = _write(model, groups, decoder, stream.prompts, stream.seeds, num_frames, files)
    if files.state is not None:
        stream.save(files.state, decoder.state_dict())
    return WrittenClips(len(stream.seeds), num_frames)


def clip_codec(model: PretrainedVDiPoM) -> ClipCodec:
    """Return the model's codec, which is one for clips. Raise InputError as `model.codec`."""
    codec = model.codec
    assert isinstance(codec, ClipCodec), "recipes with another codec are refused"
    return codec


def num_latent_frames(model: PretrainedVDiPoM, num_frames: int | None, begun: int = 0) -> int:
    """Return the number of latent frames for `num_frames` frames that follow on `begun` latent frames.

    Args:
        model: The model.
        num_frames: Number of frames; None = of clips as in the recipe.
        begun: Number of latent frames that exist already.

    Returns:
        The number of further latent frames.

    Raises:
        InputError: They are no whole frame groups of the model, or no whole batches of the codec; the message names
            the nearest numbers that fit.
    """
    if num_frames is None:
        return model.card.sampling.num_frames or model.config.latent_shape[1]
    codec = clip_codec(model)
    unit = math.lcm(model.config.patch_frames, codec.latent_batch) if begun else model.config.patch_frames

    def frames(num_units: int) -> int:
        return codec.num_pixel_frames(begun + num_units * unit) - codec.num_pixel_frames(begun)

    # A latent frame is at least one frame.
    num_units = bisect_right(range(1, num_frames // unit + 1), num_frames, key=frames)
    if frames(num_units) == num_frames > 0:
        return num_units * unit
    nearest = " or ".join(str(frames(number)) for number in (num_units, num_units + 1) if number)
    raise InputError(
        f"--frames {num_frames}: frames come {unit} latent frames at a time from this model and its codec "
        f"({codec.name}); the nearest that fit are {nearest}"
    )


def start_frames(model: PretrainedVDiPoM, num_frames: int | None) -> list[int]:
    """Return the numbers of given frames that clips of `num_frames` can begin with, ascending; the last is all frames.

    The latent frames of so many frames are the beginning of those of the clips; a codec may encode other numbers in
    another way.
    """
    codec = clip_codec(model)
    num_latent = num_latent_frames(model, num_frames)
    fewest = num_latent % codec.latent_batch or codec.latent_batch
    return [codec.num_pixel_frames(number) for number in range(fewest, num_latent + 1, codec.latent_batch)]


def pixel_size(model: PretrainedVDiPoM, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the (height, width) of clips in pixels; None = the largest trained on. Raise InputError for a misfit."""
    height, width = _latent_size(model, size)
    factor = clip_codec(model).factor
    return height * factor, width * factor


def _latent_size(model: PretrainedVDiPoM, size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        return model.config.latent_shape[2], model.config.latent_shape[3]
    factor = clip_codec(model).factor
    unit = factor * model.config.patch_size
    fitting = [max(1, round(side / unit)) * unit for side in size]
    if fitting != list(size):
        raise InputError(
            f"--size {size[0]}x{size[1]}: this model makes multiples of {unit} pixels; "
            f"the nearest is {fitting[0]}x{fitting[1]}"
        )
    return size[0] // factor, size[1] // factor


def _known(model: PretrainedVDiPoM, request: ClipRequest, num_clips: int) -> Tensor | None:
    """Encode the frames that the clips begin with: normalised latents (b c f h w).

    A picture is repeated for as many frames as the codec needs, and only the first latent frame is kept: so the clip
    can begin to move as soon as possible.
    """
    start = request.start
    if start is None:
        return None
    codec = clip_codec(model)
    is_picture = start.shape[2] == 1
    fewest = start_frames(model, request.num_frames)[0]
    frames = start.expand(-1, -1, fewest, -1, -1) if is_picture else start
    noise = torch.zeros(1, *codec.latent_shape(*frames.shape[2:])) if codec.needs_noise else None
    stored = codec.encode(frames, noise)
    latents = stored.chunk(2, dim=1)[0] if codec.stores_moments else stored  # the posterior's mean, in either case
    known = normalize(latents[:, :, :1] if is_picture else latents, model.card.normalization)
    return known.expand(num_clips, -1, -1, -1, -1)


def _until(
    stopping: Callable[[], bool], model: PretrainedVDiPoM, stream: ClipStream, num_groups: int
) -> Iterator[Tensor]:
    """Yield `num_groups` groups of a stream; once `stopping()`, fewer, but whole batches of the codec.

    Clips can only be continued after a whole batch. A first batch that is longer, of an odd number of latent frames,
    is whole when the frames that are still missing are whole batches. A codec that decodes whole clips needs them all.
    """
    codec, patch_frames = clip_codec(model), model.config.patch_frames
    for number in range(num_groups):
        is_whole = (
            codec.continues
            and number * patch_frames >= codec.latent_batch
            and (num_groups - number) * patch_frames % codec.latent_batch == 0
        )
        if is_whole and stopping():
            return
        yield next(stream)


def _write(
    model: PretrainedVDiPoM,
    groups: Iterator[Tensor],
    decoder: ClipDecoder,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_frames: int,
    files: ClipFiles,
) -> int:
    """Decode frame groups (b c p h w), normalised, and write them as they come; return the number of frames.

    `num_frames` is the number that is expected.
    """
    sheet, num_written = ContactSheet(num_frames), 0
    kept = []
    with ExitStack() as stack:
        fps, num_columns = model.card.fps or DEFAULT_FPS, list(prompts).count(prompts[0])
        writers = [
            (stack.enter_context(open_clips(path, fps, num_columns)), clips) for path, clips in files.mp4s(len(seeds))
        ]
        for group in groups:
            pixels = decoder.decode(model.card.denormalize(group)).cpu()
            for writer, clips in writers:
                writer.write(pixels[clips])
            sheet.add(pixels)
            num_written += pixels.shape[2]
            if files.npz is not None:
                kept.append(to_bytes(pixels))
    if files.sheet is not None:
        sheet.save(files.sheet)
    if files.npz is not None:
        whole = np.concatenate(kept, axis=2).transpose(0, 2, 3, 4, 1)
        with atomic_write(files.npz) as file:
            np.savez_compressed(file, clips=whole, prompts=np.array(prompts), seeds=np.array(seeds))
    return num_written
