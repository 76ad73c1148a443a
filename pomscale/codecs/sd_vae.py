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
except (ImportError, RuntimeError) as error:  # RuntimeError: diffusers is there, but something that it imports is not
    raise InputError(f"codec sd_vae needs the package diffusers: {error}. Run: pip install -e '.[vae]'") from error

# The keys of config.json that change the arithmetic. Listed, since every version of diffusers adds keys of its own.
_ARITHMETIC_KEYS = (
    "act_fn",
    "block_out_channels",
    "down_block_types",
    "in_channels",
    "latent_channels",
    "layers_per_block",
    "mid_block_add_attention",
    "norm_num_groups",
    "out_channels",
    "scaling_factor",
    "shift_factor",
    "up_block_types",
    "use_post_quant_conv",
    "use_quant_conv",
)

# What diffusers raises for folders that hold no weights, or a config.json with wrong values.
_LOAD_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)

# Decoding takes many times the memory of the pictures that come out.
_DECODE_BATCH = 8


class SdVaeCodec:
    """AutoencoderKL in evaluation mode, without gradients. Encodes in `config.precision`, decodes in float32."""

    name = "sd_vae"
    num_channels_in = 3

    def __init__(self, config: SdVaeCodecConfig) -> None:
        self.config = config
        try:
            vae, loading = AutoencoderKL.from_pretrained(
                config.path, torch_dtype=torch.float32, output_loading_info=True
            )
            self.scaling_factor = float(vae.config.scaling_factor)
            self.shift = float(vae.config.shift_factor or 0.0)
        except _LOAD_ERRORS as error:
            raise InputError(
                f"codec.path: cannot load an AutoencoderKL from {config.path!r}: {error}. "
                f"Give a folder with config.json and weights, or a hub id that this machine can reach"
            ) from error
        # diffusers only warns of these, and gives missing tensors random values.
        misfits = {kind: names for kind, names in loading.items() if names}
        if misfits:
            raise InputError(
                f"codec.path: the weights in {config.path!r} do not fit its config.json: {misfits}. "
                f"Get them again; the copy is incomplete or of another model"
            )
        self.vae = vae.eval().requires_grad_(False)
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
        chunks = latents.to(self.device, torch.float32).split(_DECODE_BATCH)
        images = torch.cat([self.vae.decode(chunk).sample for chunk in chunks])
        return ((images + 1.0) / 2.0).clamp(0.0, 1.0)

    def identity(self) -> str:
        architecture = {key: self.vae.config[key] for key in _ARITHMETIC_KEYS}
        digest = hashlib.sha256(f"sd_vae {json.dumps(architecture, sort_keys=True)}".encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().numpy())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> SdVaeCodec:
        self.device = torch.device(device)
        self.vae.to(self.device)
        return self
