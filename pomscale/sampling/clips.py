"""`pomscale sample` of a model of clips: into mp4 files, at constant memory where the model makes frame by frame.

Frames are those one sees, the pixel frames; latent frames, of which a codec makes one to four of them, are called so.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from pomscale.base.condition import Text
from pomscale.base.console import track
from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write, make_folder
from pomscale.codecs.base import ClipCodec, ClipDecoder
from pomscale.config.sampling import SamplerName
from pomscale.data.normalize import normalize
from pomscale.media.sheets import ContactSheet, open_clips, to_bytes
from pomscale.pretrained.card import DEFAULT_FPS
from pomscale.pretrained.load import PretrainedVDiPoM, sample
from pomscale.sampling.stream import ClipStream

MP4 = ".mp4"


@dataclass(frozen=True, slots=True)
class Films:
    """Where clips go. What is None is not written."""

    out: Path
    """NAME.mp4: one file with all clips, a row per prompt; any other name: a folder with one file per clip."""
    sheet: Path | None = None
    """PNG: a row per clip, frames evenly spaced in it."""
    npz: Path | None = None
    """clips uint8 (n f h w c), prompts and seeds; takes memory for all frames."""
    state: Path | None = None
    """What `continue_clips` needs."""

    def make_folders(self) -> None:
        """InputError if there cannot be such files, or `out` is no name for clips: before the work, not after it."""
        if self.out.suffix not in ("", MP4):
            raise InputError(f"--out {self.out}: clips are written to a file {MP4}, or one by one into a folder")
        if not self.out.suffix:
            make_folder(self.out)
        for path in filter(None, (self.out if self.out.suffix else None, self.sheet, self.npz, self.state)):
            make_folder(path.parent)
            if path.is_dir():
                raise InputError(f"{path}: is a folder; name a file")

    def mp4s(self, num_clips: int) -> list[tuple[Path, slice]]:
        """The files, each with the clips that it shows."""
        if self.out.suffix:
            return [(self.out, slice(None))]
        return [(self.out / f"{number:04d}{MP4}", slice(number, number + 1)) for number in range(num_clips)]


@dataclass(frozen=True, slots=True)
class Take:
    """How clips are made. None = as the model's recipe says."""

    num_frames: int | None = None
    size: tuple[int, int] | None = None
    """(height, width) in pixels."""
    sampler: SamplerName | None = None
    steps: int | None = None
    guidance: float | None = None
    batch: int = 64
    """Most clips at once, where all frames of them are made at once. Does not change the clips."""


class Filmed(NamedTuple):
    """num_frames: of each clip, that are written now; fewer than asked for if it was to stop."""

    num_clips: int
    num_frames: int


class _Settings(TypedDict):
    sampler: SamplerName | None
    steps: int
    guidance: float


def film_clips(
    model: PretrainedVDiPoM,
    prompts: Sequence[str],
    seeds: Sequence[int],
    films: Films,
    take: Take = Take(),
    *,
    text: Text | None = None,
    start: Tensor | None = None,
    stopping: Callable[[], bool] = lambda: False,
    show_progress: bool = False,
) -> Filmed:
    """A clip per prompt and seed. text: what `encode_prompts` has made of the prompts, if that is there already.

    A model with the block-causal mask makes them frame group by frame group, and what is written needs no memory; once
    `stopping()`, it makes no more, and what is there becomes whole files. Other models make all frames at once.
    start: (1 1|3 f H W) in [0, 1], frames that every clip begins with, f one of `start_frames`; one frame is a picture,
    which the clips set in motion.
    Raises InputError for what does not fit the model, PomscaleError if a file cannot be written.
    """
    films.make_folders()
    codec, of_group = clip_codec(model), model.config.patch_frames
    num_latent = num_latent_frames(model, take.num_frames)
    size = _latent_size(model, take.size)
    known = None
    if start is not None:
        known = _known(model, start, start_frames(model, take.num_frames)[0]).expand(len(seeds), -1, -1, -1, -1)
        if known.shape[2] >= num_latent:
            raise InputError(
                "--from: what is given fills all the frames asked for, and leaves none to make; raise --frames"
            )
    settings = _settings(model, take)
    num_groups, num_frames = num_latent // of_group, codec.num_pixel_frames(num_latent)
    decoder = codec.decoder(num_latent)
    if model.config.temporal == "block_causal":
        stream = ClipStream(model, text or prompts, seeds, num_groups=num_groups, known=known, size=size, **settings)
        groups = track(_until(stopping, model, stream, num_groups), "frame groups", num_groups, enabled=show_progress)
        num_frames = _write(model, groups, decoder, prompts, seeds, num_frames, films)
        if films.state is not None:
            stream.save(films.state, decoder.state_dict())
        return Filmed(len(seeds), num_frames)
    if films.state is not None:
        raise InputError(
            "--save-state: this model makes all frames at once, so there is nothing to go on with; "
            "train one with model.temporal: block_causal, or continue a clip with --from"
        )
    latents = sample(
        model,
        text or prompts,
        seeds=seeds,
        num_frames=num_latent,
        size=size,
        known=known,
        batch=take.batch,
        show_progress=show_progress,
        **settings,
    )
    groups = track(latents.split(of_group, dim=2), "frame groups", num_groups, enabled=show_progress)
    return Filmed(len(seeds), _write(model, groups, decoder, prompts, seeds, num_frames, films))


def continue_clips(
    model: PretrainedVDiPoM,
    state: Path,
    num_frames: int,
    films: Films,
    *,
    stopping: Callable[[], bool] = lambda: False,
    show_progress: bool = False,
) -> Filmed:
    """The next `num_frames` of clips whose state was saved, exactly as if they had not been interrupted.

    What is written holds these frames alone. stopping as in `film_clips`. Raises as `film_clips`, and InputError for
    the state of another model.
    """
    films.make_folders()
    stream, carried = ClipStream.resume(model, state, num_groups=None)
    if stream.prompts is None:
        raise InputError(f"{state}: saved without prompts, of embeddings of texts; go on with clips.ClipStream.resume")
    begun = stream.next_group * model.config.patch_frames
    num_groups = num_latent_frames(model, num_frames, begun) // model.config.patch_frames
    decoder = clip_codec(model).decoder(begun)
    decoder.load_state_dict(carried)
    groups = track(_until(stopping, model, stream, num_groups), "frame groups", num_groups, enabled=show_progress)
    num_frames = _write(model, groups, decoder, stream.prompts, stream.seeds, num_frames, films)
    if films.state is not None:
        stream.save(films.state, decoder.state_dict())
    return Filmed(len(stream.seeds), num_frames)


def film(
    model: PretrainedVDiPoM,
    prompt: str,
    *,
    seed: int,
    out: Path,
    num_frames: int | None = None,
    sampler: SamplerName | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    text: Text | None = None,
) -> None:
    """One clip into one mp4. text as in `film_clips`."""
    take = Take(num_frames=num_frames, sampler=sampler, steps=steps, guidance=guidance)
    film_clips(model, [prompt], [seed], Films(out), take, text=text)


def clip_codec(model: PretrainedVDiPoM) -> ClipCodec:
    """The model's codec. InputError as `model.codec`."""
    codec = model.codec
    assert isinstance(codec, ClipCodec), "recipes with another codec are refused"
    return codec


def num_latent_frames(model: PretrainedVDiPoM, num_frames: int | None, begun: int = 0) -> int:
    """Latent frames of so many frames, that follow on `begun` latent frames; None = of clips as in the recipe.

    InputError, with the nearest numbers that fit, if they are no whole frame groups of the model, or no whole batches
    of the codec.
    """
    if num_frames is None:
        return model.card.sampling.num_frames or model.config.latent_shape[1]
    codec = clip_codec(model)
    unit = math.lcm(model.config.patch_frames, codec.latent_batch) if begun else model.config.patch_frames

    def frames(num_units: int) -> int:
        return codec.num_pixel_frames(begun + num_units * unit) - codec.num_pixel_frames(begun)

    # A latent frame is one frame at least.
    num_units = bisect_right(range(1, num_frames // unit + 1), num_frames, key=frames)
    if frames(num_units) == num_frames > 0:
        return num_units * unit
    nearest = " or ".join(str(frames(number)) for number in (num_units, num_units + 1) if number)
    raise InputError(
        f"--frames {num_frames}: frames come {unit} latent frames at a time from this model and its codec "
        f"({codec.name}); the nearest that fit are {nearest}"
    )


def start_frames(model: PretrainedVDiPoM, num_frames: int | None) -> list[int]:
    """How many given frames clips of `num_frames` can begin with, ascending; the last number is all of them.

    Those whose latent frames are the beginning of such clips: a codec may encode others in another way.
    """
    codec = clip_codec(model)
    num_latent = num_latent_frames(model, num_frames)
    fewest = num_latent % codec.latent_batch or codec.latent_batch
    return [codec.num_pixel_frames(number) for number in range(fewest, num_latent + 1, codec.latent_batch)]


def pixel_size(model: PretrainedVDiPoM, size: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of clips, by default of the largest trained on. InputError for what the model cannot make."""
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


def _known(model: PretrainedVDiPoM, start: Tensor, fewest: int) -> Tensor:
    """Normalised latents (1 c f h w) of the frames that are given.

    A picture is shown for as many frames as the codec needs, of which the first latent frame counts: so the clip can
    begin to move as soon as possible.
    """
    codec = clip_codec(model)
    is_picture = start.shape[2] == 1
    frames = start.expand(-1, -1, fewest, -1, -1) if is_picture else start
    noise = torch.zeros(1, *codec.latent_shape(*frames.shape[2:])) if codec.needs_noise else None
    stored = codec.encode(frames, noise)
    latents = stored.chunk(2, dim=1)[0] if codec.stores_moments else stored  # the posterior's mean, in either case
    return normalize(latents[:, :, :1] if is_picture else latents, model.card.normalization)


def _settings(model: PretrainedVDiPoM, take: Take) -> _Settings:
    """What is asked for, or else as the recipe says."""
    defaults = model.card.sampling
    return {
        "sampler": take.sampler or defaults.sampler,
        "steps": take.steps or defaults.num_steps,
        "guidance": defaults.guidance if take.guidance is None else take.guidance,
    }


def _until(
    stopping: Callable[[], bool], model: PretrainedVDiPoM, stream: ClipStream, num_groups: int
) -> Iterator[Tensor]:
    """So many groups of a stream, or fewer, but whole batches of the codec: clips can only be gone on with after one.

    A first batch that is longer, of an odd number of latent frames, is whole when those that are missing are.
    """
    patch_frames, latent_batch = model.config.patch_frames, clip_codec(model).latent_batch
    for number in range(num_groups):
        is_whole = number * patch_frames >= latent_batch and (num_groups - number) * patch_frames % latent_batch == 0
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
    films: Films,
) -> int:
    """Frame groups (b c p h w), normalised, as they come: decoded and written, `num_frames` in all. How many it was."""
    sheet, num_written = ContactSheet(num_frames), 0
    kept = []
    with ExitStack() as stack:
        fps, num_columns = model.card.fps or DEFAULT_FPS, list(prompts).count(prompts[0])
        writers = [
            (stack.enter_context(open_clips(path, fps, num_columns)), clips) for path, clips in films.mp4s(len(seeds))
        ]
        for group in groups:
            pixels = decoder.decode(model.card.denormalize(group)).cpu()
            for writer, clips in writers:
                writer.write(pixels[clips])
            sheet.add(pixels)
            num_written += pixels.shape[2]
            if films.npz is not None:
                kept.append(to_bytes(pixels))
    if films.sheet is not None:
        sheet.save(films.sheet)
    if films.npz is not None:
        whole = np.concatenate(kept, axis=2).transpose(0, 2, 3, 4, 1)
        with atomic_write(films.npz) as file:
            np.savez_compressed(file, clips=whole, prompts=np.array(prompts), seeds=np.array(seeds))
    return num_written
