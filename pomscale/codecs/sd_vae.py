"""Stable Diffusion's image VAE: a thin adapter on diffusers' AutoencoderKL."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from pomscale.config.schema import SdVaeCodecConfig
from pomscale.errors import InputError

try:
    from diffusers import AutoencoderKL
except ImportError as error:
    raise InputError("codec sd_vae needs the package diffusers: pip install 'pomscale[vae]'") from error


class SdVaeCodec:
    """AutoencoderKL in evaluation mode, without gradients. Encodes in `config.precision`, decodes in float32."""

    name = "sd_vae"
    num_channels_in = 3

    def __init__(self, config: SdVaeCodecConfig) -> None:
        self.config = config
        try:
            self.vae = (
                AutoencoderKL.from_pretrained(config.path, torch_dtype=torch.float32).eval().requires_grad_(False)
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"codec.path: cannot load an AutoencoderKL from {config.path!r}: {error}. "
                f"Give a folder with config.json and weights, or a hub id that this machine can reach"
            ) from error
        self.scaling_factor: float = self.vae.config.scaling_factor
        self.shift: float = self.vae.config.shift_factor or 0.0
        self.stores_moments = config.store == "moments"
        self.needs_noise = config.store == "sample"
        self.device = torch.device("cpu")

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if height % factor or width % factor:
            raise InputError(
                f"codec sd_vae: {height}x{width} pixels are not a multiple of {factor}, the codec's downsampling; "
                f"change transform.size"
            )
        return self.vae.config.latent_channels, height // factor, width // factor

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        self.latent_shape(*images.shape[-2:])
        pixels = 2.0 * images.to(self.device, torch.float32) - 1.0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            posterior = self.vae.encode(pixels).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        if self.stores_moments:
            return torch.cat([mean, logvar], dim=1)
        assert noise is not None, "store: sample needs the caller's noise"
        return mean + torch.exp(0.5 * logvar) * noise.to(mean)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        images = self.vae.decode(latents.to(self.device, torch.float32)).sample
        return ((images + 1.0) / 2.0).clamp(0.0, 1.0)

    def identity(self) -> str:
        # Keys that start with "_" record where the weights came from, not what they are.
        architecture = {key: value for key, value in self.vae.config.items() if not key.startswith("_")}
        digest = hashlib.sha256(f"sd_vae store={self.config.store} precision={self.config.precision}".encode())
        digest.update(json.dumps(architecture, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().numpy())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> SdVaeCodec:
        self.device = torch.device(device)
        self.vae.to(self.device)
        return self
