"""CogVideoX's causal 3-D video VAE: a thin adapter on diffusers' AutoencoderKLCogVideoX."""

from __future__ import annotations

from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.codecs.clip_decoders import COGVIDEOX_BATCH, CogVideoXDecoder
from pomscale.codecs.diffusers_vae import AutoencoderKLCogVideoX, DiffusersVae
from pomscale.config.codecs import CogVideoXVaeCodecConfig

# The network takes frames in batches of 8 and latent frames in batches of 2, whatever its config says; it carries the
# convolutions' past from batch to batch, and a frame more than whole batches goes with the first.
_BATCH_FRAMES = 8
_TIME_COMPRESSION = _BATCH_FRAMES // COGVIDEOX_BATCH


class CogVideoXVaeCodec(DiffusersVae):
    """Codec of clips (b, 3, f, H, W) and latents (b, 16, f', H / 8, W / 8); channels and factor follow the config.json.

    f' is f / 4 for f = 8k and (f + 3) / 4 for f = 8k + 1. The network takes other counts too, but decodes them to clips
    of another length (20 frames to 17), so they are refused. Pictures (b, 3, H, W) go through it as clips of one frame,
    to latents (b, 16, H / 8, W / 8).

    A clip is encoded by itself, with no past, so its latent depends neither on the batch it is in nor on earlier calls.
    """

    name = "cogvideox_vae"
    own_arithmetic_keys = ("temporal_compression_ratio",)
    decode_batch = 1
    latent_batch = COGVIDEOX_BATCH

    def __init__(self, config: CogVideoXVaeCodecConfig) -> None:
        super().__init__(config, AutoencoderKLCogVideoX)
        self.config = config
        ratio = self.vae.config.temporal_compression_ratio
        if ratio != _TIME_COMPRESSION:
            raise InputError(
                f"codec.path: temporal_compression_ratio is {ratio} in the config.json of {config.path!r}; diffusers "
                f"takes {_BATCH_FRAMES} frames or 2 latent frames at a time, which suits {_TIME_COMPRESSION} only"
            )
        # Activations of one clip at a time: those of a batch would not fit.
        self.vae.enable_slicing()
        if config.tiling:
            self.vae.enable_tiling()
            self._check_tiles()

    @property
    def factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, *size: int) -> tuple[int, ...]:
        if len(size) == 2:
            channels, _, height, width = self.latent_shape(1, *size)
            return channels, height, width
        frames, height, width = size
        fitting = (_fitting_frames(frames), _multiples(height, self.factor), _multiples(width, self.factor))
        if fitting != ([frames], [height], [width]):
            nearest = " x ".join(" or ".join(map(str, numbers)) for numbers in fitting)
            raise InputError(
                f"codec cogvideox_vae: clips of {frames} x {height} x {width} (frames, height, width) do not fit; it "
                f"takes 8k or 8k + 1 frames and multiples of {self.factor} pixels, the nearest are {nearest}; "
                f"change transform.buckets"
            )
        latent_frames = frames // _TIME_COMPRESSION + frames % _BATCH_FRAMES
        return self.vae.config.latent_channels, latent_frames, height // self.factor, width // self.factor

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        if images.ndim == 5:
            return super().encode(images, noise)
        return super().encode(images[:, :, None], None if noise is None else noise[:, :, None])[:, :, 0]

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents) if latents.ndim == 5 else super().decode(latents[:, :, None])[:, :, 0]

    def num_pixel_frames(self, latent_frames: int) -> int:
        odd = latent_frames % COGVIDEOX_BATCH
        return (latent_frames - odd) * _TIME_COMPRESSION + odd

    def decoder(self, latent_frames: int) -> CogVideoXDecoder:
        return CogVideoXDecoder(self.vae, latent_frames)

    def _check_tiles(self) -> None:
        """Raise InputError where diffusers would round the positions of tiles differently in pixels and latents."""
        vae = self.vae
        for side, overlap in (("height", vae.tile_overlap_factor_height), ("width", vae.tile_overlap_factor_width)):
            pixels, latents = getattr(vae, f"tile_sample_min_{side}"), getattr(vae, f"tile_latent_min_{side}")
            strides = [int(pixels * (1 - overlap)), int(latents * (1 - overlap)) * self.factor]
            kept = [pixels - int(pixels * overlap), (latents - int(latents * overlap)) * self.factor]
            if len({*strides, *kept}) != 1:
                raise InputError(
                    f"codec.tiling: tiles of {side} {pixels}, from sample_{side} in the config.json of "
                    f"{self.config.path!r}, do not meet; set codec.tiling=false"
                )


def _fitting_frames(frames: int) -> list[int]:
    """Return `frames` if that count fits, else the nearest below and above."""
    extra = frames % _BATCH_FRAMES
    return [frames] if extra <= 1 else [frames - extra + 1, frames - extra + _BATCH_FRAMES]


def _multiples(pixels: int, factor: int) -> list[int]:
    """Return `pixels` if it is a multiple of `factor`, else the nearest below, unless that is 0, and above."""
    extra = pixels % factor
    return [pixels] if extra == 0 else [side for side in (pixels - extra, pixels - extra + factor) if side]
