"""Decode latents to pixels chunk by chunk: clips of any length, in the memory of a few frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pomscale.base.errors import InputError

# Latent frames that CogVideoX decodes at a time, as in its training; an odd clip has one more in its first batch.
COGVIDEOX_BATCH = 2

# Convolutions over one frame have no past, but diffusers puts their whole input into the cache all the same: two fifths
# of it, and never read.
_WITHOUT_PAST = ("conv_y", "conv_b")


class FramewiseDecoder:
    """The decoder of a codec that decodes each frame by itself, and so has no state."""

    def __init__(self, decode: Callable[[Tensor], Tensor]) -> None:
        self.decode = decode

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise InputError("the saved clip was decoded by another codec; continue with the model that made it")


class CogVideoXDecoder:
    """Decodes a clip chunk by chunk to the frames of `vae.decode` of the whole clip, for chunks of any length.

    The network decodes latent frames in batches of two and passes the last two inputs of every convolution on to the
    next batch. It normalises over a batch, so the batches must be the same ones: latent frames wait here until their
    batch is full, and a clip of an odd number has three in the first. So that number must be known at the beginning,
    and a clip is continued by an even number.

    If the network has tiles enabled, each has a past of its own, and they are blended as in `vae.tiled_decode`.

    The state consists of the pasts per clip and tile, and the latent frames that wait. For CogVideoX's own sizes the
    pasts are large (1.4 GiB per clip of 240x384 pixels), but they do not grow.
    """

    def __init__(self, vae: Any, latent_frames: int) -> None:
        """Prepare for clips that begin with `latent_frames`, before they are continued."""
        self._vae = vae
        self._due = 1 if latent_frames == 1 else COGVIDEOX_BATCH + latent_frames % COGVIDEOX_BATCH
        self._waiting: Tensor | None = None
        self._pasts: dict[str, Tensor] = {}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self._vae.device, torch.float32)
        if self._waiting is not None:
            latents = torch.cat([self._waiting, latents], dim=2)
        parts = []
        while latents.shape[2] >= self._due:
            batch, latents = latents[:, :, : self._due], latents[:, :, self._due :]
            # One clip at a time, as for encoding: the activations of several would not fit.
            parts.append(torch.cat([self._decode_clip(number, clip) for number, clip in enumerate(batch.split(1))]))
            self._due = COGVIDEOX_BATCH
        self._waiting = latents.clone()
        if not parts:
            size = [side * 2 ** (len(self._vae.config.block_out_channels) - 1) for side in latents.shape[3:]]
            return latents.new_empty(len(latents), self._vae.config.out_channels, 0, *size)
        return ((torch.cat(parts, dim=2) + 1.0) / 2.0).clamp(0.0, 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        state = {"due": torch.tensor(self._due), "tile": self._tile_size()}
        state |= {f"past.{name}": past for name, past in self._pasts.items()}
        return state if self._waiting is None else {**state, "waiting": self._waiting}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state. Raises InputError for one of another codec, or one that was saved with other tiles."""
        if "due" not in state:
            raise InputError("the saved clip was decoded by another codec; continue with the model that made it")
        if not torch.equal(state["tile"].cpu(), self._tile_size()):
            raise InputError("the saved clip was decoded in other tiles; continue with the codec.tiling that made it")
        self._due = int(state["due"])
        device = self._vae.device
        self._waiting = state["waiting"].to(device) if "waiting" in state else None
        self._pasts = {name.removeprefix("past."): past.to(device) for name, past in state.items() if "." in name}

    def _tile_size(self) -> Tensor:
        """Return height and width of a tile in latent pixels; 0 = whole frames."""
        vae = self._vae
        return torch.tensor([vae.tile_latent_min_height, vae.tile_latent_min_width]) * vae.use_tiling

    def _decode_clip(self, number: int, batch: Tensor) -> Tensor:
        """Decode (1 c f h w) to (1 3 F H W) in [-1, 1], as diffusers' `_decode` and `tiled_decode` do."""
        vae = self._vae
        height, width = batch.shape[3:]
        if not (vae.use_tiling and (width > vae.tile_latent_min_width or height > vae.tile_latent_min_height)):
            return self._decode_tile(f"{number}.0.0", batch)
        strides = (
            int(vae.tile_latent_min_height * (1 - vae.tile_overlap_factor_height)),
            int(vae.tile_latent_min_width * (1 - vae.tile_overlap_factor_width)),
        )
        blend_height = int(vae.tile_sample_min_height * vae.tile_overlap_factor_height)
        blend_width = int(vae.tile_sample_min_width * vae.tile_overlap_factor_width)
        kept_height, kept_width = vae.tile_sample_min_height - blend_height, vae.tile_sample_min_width - blend_width
        above: list[Tensor] = []
        rows = []
        for i, top in enumerate(range(0, height, strides[0])):
            tiles: list[Tensor] = []
            for j, left in enumerate(range(0, width, strides[1])):
                latents = batch[..., top : top + vae.tile_latent_min_height, left : left + vae.tile_latent_min_width]
                tile = self._decode_tile(f"{number}.{i}.{j}", latents)
                # Both blend in place, with neighbours that are blended themselves.
                tile = vae.blend_v(above[j], tile, blend_height) if above else tile
                tiles.append(vae.blend_h(tiles[-1], tile, blend_width) if tiles else tile)
            rows.append(torch.cat([tile[..., :kept_height, :kept_width] for tile in tiles], dim=4))
            above = tiles
        return torch.cat(rows, dim=3)

    def _decode_tile(self, name: str, latents: Tensor) -> Tensor:
        """Decode one batch of one tile, with the past of that tile."""
        vae = self._vae
        prefix = f"{name}."
        past = {key.removeprefix(prefix): value for key, value in self._pasts.items() if key.startswith(prefix)}
        if vae.post_quant_conv is not None:
            latents = vae.post_quant_conv(latents)
        pixels, past = vae.decoder(latents, conv_cache=_nested(past))
        self._pasts.update((prefix + key, value) for key, value in _flat(past))
        return pixels


def _flat(cache: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of diffusers' nested dict, by their dotted names."""
    for name, value in cache.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif name not in _WITHOUT_PAST:
            yield prefix + name, value


def _nested(cache: dict[str, Tensor]) -> dict[str, Any]:
    """Return the nested dict that `_flat` took apart."""
    nested: dict[str, Any] = {}
    for name, value in cache.items():
        *folders, last = name.split(".")
        inner = nested
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = value
    return nested
