"""Decode latents of clips to the frames that are measured, holding no more pixels than these."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pomscale.codecs.base import ClipDecoder
from pomscale.evaluation.generated.picture_sets import Frames, to_pixels


def decode_frames(name: str, decoder: ClipDecoder, latents: Iterable[Tensor], frames: Frames, out: Tensor) -> None:
    """Decode clips latent frame by latent frame, and stop after the last frame that is measured.

    Args:
        name: Name of the clips for messages.
        decoder: A decoder of clips of the whole length.
        latents: Unscaled latents (b c f h w) of the next frames, whatever f is. They are taken as they are needed.
        frames: The frames that are measured.
        out: Receives them, (b 1|3 frames.num H W) uint8 on the CPU.
    """
    num_seen = num_kept = 0
    for part in latents:
        pixels = decoder.decode(part)
        kept = pixels[:, :, -num_seen % frames.stride :: frames.stride][:, :, : frames.num - num_kept]
        out[:, :, num_kept : num_kept + kept.shape[2]] = to_pixels(name, kept)
        num_seen, num_kept = num_seen + pixels.shape[2], num_kept + kept.shape[2]
        if num_kept == frames.num:
            return
    raise ValueError(f"{name}: {num_kept} frames were decoded, and {frames.num} are measured")
