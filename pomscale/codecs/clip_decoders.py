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

# diffusers' mark of a convolution in time that has seen the first latent frame alone, which it does not convolve.
_WAN_MARK = "Rep"


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


class WanDecoder:
    """Decodes a clip latent frame by latent frame, to the frames of `vae.decode` of the whole clip but for rounding.

    The network of Wan decodes so by itself: it passes the last two inputs of every causal convolution on to the next
    latent frame, and normalises each pixel by itself. Here the convolution before that is by latent frame, too, so that
    chunks of any length give the same bits. The state consists of these inputs, per clip; it does not grow.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._num_decoded = 0
        self._pasts: list[list[Any]] = []

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self._vae.device, torch.float32)
        if not self._pasts:
            self._pasts = [[None] * self._num_convolutions for _ in latents]
        # One clip at a time, as for encoding: the activations of several would not fit.
        clips = [self._decode_clip(past, clip) for past, clip in zip(self._pasts, latents.split(1), strict=True)]
        self._num_decoded += latents.shape[2]
        return ((torch.cat(clips) + 1.0) / 2.0).clamp(0.0, 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        state = {"decoded": torch.tensor(self._num_decoded), "clips": torch.tensor(len(self._pasts))}
        for clip, past in enumerate(self._pasts):
            # Before the second latent frame, convolutions in time have a mark in place of a past.
            state |= {
                f"past.{clip}.{number}": value if isinstance(value, Tensor) else torch.empty(0)
                for number, value in enumerate(past)
                if value is not None
            }
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state. Raises InputError for one of another codec."""
        if "decoded" not in state:
            raise InputError("the saved clip was decoded by another codec; continue with the model that made it")
        self._num_decoded = int(state["decoded"])
        self._pasts = [[None] * self._num_convolutions for _ in range(int(state["clips"]))]
        for name, value in state.items():
            if name.startswith("past."):
                _, clip, number = name.split(".")
                self._pasts[int(clip)][int(number)] = value.to(self._vae.device) if value.numel() else _WAN_MARK

    @property
    def _num_convolutions(self) -> int:
        return int(self._vae._cached_conv_counts["decoder"])

    def _decode_clip(self, past: list[Any], latents: Tensor) -> Tensor:
        """Decode (1 c f h w) to (1 3 F H W) in [-1, 1], as diffusers' `_decode` does."""
        vae = self._vae
        frames = [
            vae.decoder(
                vae.post_quant_conv(frame), feat_cache=past, feat_idx=[0], first_chunk=self._num_decoded + number == 0
            )
            for number, frame in enumerate(latents.split(1, dim=2))
        ]
        pixels = torch.cat(frames, dim=2)
        patch = vae.config.patch_size or 1
        batch, channels, num_frames, height, width = pixels.shape
        # (b, 3 x patch columns x patch rows, f, h, w) to pixels
        patches = pixels.reshape(batch, channels // patch**2, patch, patch, num_frames, height, width)
        pixels = patches.permute(0, 1, 4, 5, 3, 6, 2).reshape(batch, -1, num_frames, height * patch, width * patch)
        return pixels.clamp(-1.0, 1.0)


class WholeClipDecoder:
    """Decodes a clip at once when its last latent frame is there.

    The network normalises over the whole clip, or looks ahead, so a clip cannot be continued.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], latent_frames: int, factor: int, class_name: str) -> None:
        """Prepare for clips of `latent_frames`.

        Args:
            decode: Decode of whole clips.
            latent_frames: Number of latent frames of the clips.
            factor: Height and width in pixels over those of latents.
            class_name: Class of the network, for messages.
        """
        self._decode = decode
        self._latent_frames = latent_frames
        self._factor = factor
        self._class_name = class_name
        self._waiting: list[Tensor] = []
        self._num_waiting = 0

    def decode(self, latents: Tensor) -> Tensor:
        self._num_waiting += latents.shape[2]
        if self._num_waiting > self._latent_frames:
            raise self._refusal()
        self._waiting.append(latents)
        if self._num_waiting < self._latent_frames:
            batch, _, _, *size = latents.shape
            return latents.new_empty(batch, 3, 0, *(side * self._factor for side in size))
        whole, self._waiting = torch.cat(self._waiting, dim=2), []
        return self._decode(whole)

    def state_dict(self) -> dict[str, Tensor]:
        """Raise InputError: there is no state that another clip could go on from."""
        raise self._refusal()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raise InputError: clips are not continued."""
        raise self._refusal()

    def _refusal(self) -> InputError:
        return InputError(
            f"codec vae: the {self._class_name} decodes a clip as a whole, so none can be continued; make all frames "
            "of a clip at once"
        )


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
