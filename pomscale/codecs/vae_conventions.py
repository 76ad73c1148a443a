"""The conventions of each autoencoder of diffusers: what its pipelines do around it, in one table.

A record says how latents are scaled, what the network compresses by, which numbers of frames come back, and which keys
of config.json change its arithmetic. `CONVENTIONS` has one for each class that codec `vae` takes. Constants are read
from the network, so that a folder with others is read rightly; sources are diffusers' own pipelines (0.42.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

PerChannel = float | tuple[float, ...]
"""One number for all channels, or one for each."""

Network = Any
"""An autoencoder of diffusers."""


@dataclass(frozen=True, slots=True)
class FrameRule:
    """Numbers of frames that come back from a decode of their latents, for a network that takes the first by itself.

    They are 1 + compression * k. CogVideoX takes whole batches, too: `batch` frames, with or without one before them.
    """

    compression: int
    batch: int | None = None

    def fitting(self, frames: int) -> list[int]:
        """Return `frames` if that count fits, else the nearest below and above."""
        if self.batch is None:
            extra = (frames - 1) % self.compression
            return [frames] if extra == 0 else [frames - extra, frames - extra + self.compression]
        extra = frames % self.batch
        return [frames] if extra <= 1 else [frames - extra + 1, frames - extra + self.batch]

    def latent_frames(self, frames: int) -> int:
        """Return the number of latent frames of so many frames, which fit."""
        if self.batch is None:
            return (frames - 1) // self.compression + 1
        return frames // self.compression + frames % self.batch

    def pixel_frames(self, latent_frames: int) -> int:
        """Return the number of frames of so many latent frames."""
        if self.batch is None:
            return (latent_frames - 1) * self.compression + 1
        odd = latent_frames % (self.batch // self.compression)
        return (latent_frames - odd) * self.compression + odd

    def __str__(self) -> str:
        if self.batch is None:
            return f"{self.compression}k + 1 frames"
        return f"{self.batch}k or {self.batch}k + 1 frames"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conventions:
    """The conventions of one class. Functions take the loaded network; their errors mean a wrong config.json."""

    takes: Literal["pictures", "clips"]
    arithmetic_keys: Sequence[str]
    """Keys of config.json that change the arithmetic. Listed, since every version of diffusers adds keys of its own."""

    factor: Callable[[Network], int]
    """Height and width in pixels over those of stored latents."""

    channels: Callable[[Network], int]
    """Channels of stored latents."""

    scaling: Callable[[Network], tuple[PerChannel, PerChannel]]
    """(shift, scaling factor): the pipelines' network sees (latent - shift) * scaling factor."""

    frames: Callable[[Network], FrameRule] | None = None
    """Clips: the numbers of frames that come back."""

    label: str | None = None
    """First word of the digested identity; None = the name of the class."""

    keys_if_set: Sequence[str] = ()
    """Arithmetic keys that enter the identity where they are not null; identities without them are older."""

    pixel_channels: Callable[[Network], int] = lambda vae: vae.config.in_channels
    has_posterior: bool = True
    """Whether the encoder gives a distribution, and not the latent itself."""

    unit_pixels: bool = False
    """Whether the network takes pixels in [0, 1], and not in [-1, 1]."""

    side: Callable[[Network], int] | None = None
    """The only height and width that come back, in pixels; None: any multiple of the factor."""

    patch: int = 1
    """Side of the patches of latents that pipelines fold into channels, and that are stored so."""

    is_of_frames: bool = False
    """Whether the network of pictures takes clips of one frame."""

    tiles: bool = True
    """Whether diffusers' tiles give the whole picture back."""

    decode: Callable[[Network, Tensor], Tensor] = lambda vae, latents: vae.decode(latents, return_dict=False)[0]
    """The network's decode of unscaled latents."""

    decode_batch: int = 1
    """Pictures or clips decoded at once: decoding takes many times the memory of its result."""


def _scalar(vae: Network) -> tuple[float, float]:
    """Latent * scaling_factor: pipeline_{sana,hunyuan_video,hunyuan_video1_5}.py divide by it before they decode."""
    return 0.0, float(vae.config.scaling_factor)


def _shifted(vae: Network) -> tuple[float, float]:
    """(latent - shift_factor) * scaling_factor: pipeline_flux.py, pipeline_stable_diffusion_3.py."""
    return float(vae.config.shift_factor or 0.0), float(vae.config.scaling_factor)


def _kl(vae: Network) -> tuple[PerChannel, PerChannel]:
    """As `_shifted`; if latents_mean and latents_std are set, as pipeline_stable_diffusion_xl.py takes them."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    return _shifted(vae) if mean is None or std is None else _standardised(mean, std, vae.config.scaling_factor)


def _of_config(vae: Network) -> tuple[PerChannel, PerChannel]:
    """(latent - latents_mean) / latents_std: pipeline_{wan,qwenimage}.py."""
    return _standardised(vae.config.latents_mean, vae.config.latents_std, 1.0)


def _mochi(vae: Network) -> tuple[PerChannel, PerChannel]:
    """(latent - mean) * scaling_factor / std, pipeline_mochi.py; without both constants the scaling factor alone."""
    config = vae.config
    if config.latents_mean is None or config.latents_std is None:
        return _scalar(vae)
    return _standardised(config.latents_mean, config.latents_std, config.scaling_factor)


def _ltx(vae: Network) -> tuple[PerChannel, PerChannel]:
    """(latent - mean) * scaling_factor / std, with the network's buffers: `_normalize_latents` of pipeline_ltx.py."""
    return _standardised(vae.latents_mean.tolist(), vae.latents_std.tolist(), vae.config.scaling_factor)


def _batch_norm(vae: Network) -> tuple[PerChannel, PerChannel]:
    """The running mean and variance of the patched latents: `_encode_vae_image` of pipeline_flux2.py."""
    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return _standardised(vae.bn.running_mean.tolist(), std.tolist(), 1.0)


def _standardised(
    mean: Sequence[float], std: Sequence[float], scaling_factor: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(map(float, mean)), tuple(float(scaling_factor) / float(s) for s in std)


def _halvings(vae: Network) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _wan_factor(vae: Network) -> int:
    return int(2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1))


def _spatial_ratio(vae: Network) -> int:
    return int(vae.spatial_compression_ratio)


def _temporal_ratio(vae: Network) -> FrameRule:
    return FrameRule(int(vae.temporal_compression_ratio))


def _latent_channels(vae: Network) -> int:
    return int(vae.config.latent_channels)


def _cogvideox_frames(vae: Network) -> FrameRule:
    """Return whole batches: diffusers takes 8 frames, or 2 latent frames, at a time, whatever the config says."""
    if vae.config.temporal_compression_ratio != 4:
        raise ValueError(
            f"temporal_compression_ratio is {vae.config.temporal_compression_ratio}; diffusers takes 8 frames or 2 "
            "latent frames at a time, which suits 4 only"
        )
    return FrameRule(4, batch=8)


def _wan_frames(vae: Network) -> FrameRule:
    """Return 4k + 1: diffusers takes 4 frames at a time, whatever the config says."""
    if 2 ** sum(vae.config.temperal_downsample) != 4:
        raise ValueError(
            f"temperal_downsample is {list(vae.config.temperal_downsample)}; diffusers takes 4 frames at a time, which "
            "suits two times True only"
        )
    return FrameRule(4)


def _ltx_frames(vae: Network) -> FrameRule:
    if vae.config.patch_size_t != 1:
        raise ValueError(f"patch_size_t is {vae.config.patch_size_t}; the first frame by itself fits in none but 1")
    return _temporal_ratio(vae)


def _decode_ltx(vae: Network, latents: Tensor) -> Tensor:
    """Decode as pipeline_ltx.py does by default: at time 0, so that nothing is added to the latents.

    Some decoders (0.9.1 and later) add noise of their own inside. Each call draws the same.
    """
    times = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
    with torch.random.fork_rng(devices=[latents.device] if latents.is_cuda else []):
        torch.manual_seed(0)
        return vae.decode(latents, times, return_dict=False)[0]


def _rae_side(vae: Network) -> int:
    if not vae.reshape_to_2d:
        raise ValueError("reshape_to_2d is false; latents are stored as maps (c, h, w)")
    return int(vae.decoder_image_size)


_KL_KEYS = (
    "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
    "norm_num_groups", "out_channels", "scaling_factor", "shift_factor", "up_block_types", "use_post_quant_conv",
    "use_quant_conv",
)  # fmt: skip
_CAUSAL_KEYS = (
    "attn_scales",
    "dim_mult",
    "latents_mean",
    "latents_std",
    "num_res_blocks",
    "temperal_downsample",
    "z_dim",
)

CONVENTIONS: dict[str, Conventions] = {
    # SD 1.x, SDXL, SD3, FLUX.1, VA-VAE
    "AutoencoderKL": Conventions(
        takes="pictures",
        label="sd_vae",
        arithmetic_keys=(*_KL_KEYS, "mid_block_add_attention"),
        keys_if_set=("latents_mean", "latents_std"),
        factor=_halvings,
        channels=_latent_channels,
        scaling=_kl,
        decode_batch=8,
    ),
    # FLUX.2: pipelines fold 2 x 2 latents into channels, and normalise these
    "AutoencoderKLFlux2": Conventions(
        takes="pictures",
        arithmetic_keys=(
            "act_fn", "batch_norm_eps", "block_out_channels", "decoder_block_out_channels", "down_block_types",
            "in_channels", "latent_channels", "layers_per_block", "mid_block_add_attention", "norm_num_groups",
            "out_channels", "patch_size", "up_block_types", "use_post_quant_conv", "use_quant_conv",
        ),
        factor=lambda vae: 2 * _halvings(vae),
        channels=lambda vae: 4 * _latent_channels(vae),
        scaling=_batch_norm,
        patch=2,
        decode_batch=8,
    ),
    "AutoencoderKLQwenImage": Conventions(
        takes="pictures",
        arithmetic_keys=(*_CAUSAL_KEYS, "base_dim", "input_channels"),
        factor=_spatial_ratio,
        channels=lambda vae: int(vae.config.z_dim),
        scaling=_of_config,
        pixel_channels=lambda vae: vae.config.input_channels,
        is_of_frames=True,
    ),
    # DC-AE of Sana, 32 and 64 times
    "AutoencoderDC": Conventions(
        takes="pictures",
        arithmetic_keys=(
            "attention_head_dim", "decoder_act_fns", "decoder_block_out_channels", "decoder_block_types",
            "decoder_conv_act_fn", "decoder_in_shortcut", "decoder_layers_per_block", "decoder_norm_types",
            "decoder_qkv_multiscales", "downsample_block_type", "encoder_block_out_channels", "encoder_block_types",
            "encoder_layers_per_block", "encoder_out_shortcut", "encoder_qkv_multiscales", "in_channels",
            "latent_channels", "scaling_factor", "upsample_block_type",
        ),
        factor=_spatial_ratio,
        channels=_latent_channels,
        scaling=_scalar,
        has_posterior=False,
    ),
    # TAESD: its latents are those that the diffusion network sees; latent_magnitude and latent_shift are for storing
    # them as bytes, which pipelines do not
    "AutoencoderTiny": Conventions(
        takes="pictures",
        arithmetic_keys=(
            "act_fn", "decoder_block_out_channels", "encoder_block_out_channels", "in_channels", "latent_channels",
            "num_decoder_blocks", "num_encoder_blocks", "out_channels", "scaling_factor", "shift_factor",
            "upsample_fn", "upsampling_scaling_factor",
        ),
        factor=lambda vae: int(2 ** (len(vae.config.num_encoder_blocks) - 1)),
        channels=_latent_channels,
        scaling=_shifted,
        has_posterior=False,
        tiles=False,
        decode_batch=8,
    ),
    # RAE normalises and scales its latents itself
    "AutoencoderRAE": Conventions(
        takes="pictures",
        arithmetic_keys=(
            "decoder_hidden_size", "decoder_intermediate_size", "decoder_num_attention_heads",
            "decoder_num_hidden_layers", "encoder_hidden_size", "encoder_input_size", "encoder_num_hidden_layers",
            "encoder_patch_size", "encoder_type", "num_channels", "patch_size", "scaling_factor",
        ),
        factor=lambda vae: int(vae.config.patch_size),
        channels=lambda vae: int(vae.config.encoder_hidden_size),
        scaling=lambda _: (0.0, 1.0),
        pixel_channels=lambda vae: vae.config.num_channels,
        has_posterior=False,
        unit_pixels=True,
        side=_rae_side,
        tiles=False,
        decode_batch=8,
    ),
    # invert_scale_latents is for the picture that image-to-video pipelines show the network beside its latents, and
    # not for these: `decode_latents` divides by the scaling factor all the same
    "AutoencoderKLCogVideoX": Conventions(
        takes="clips",
        label="cogvideox_vae",
        arithmetic_keys=(*_KL_KEYS, "temporal_compression_ratio"),
        factor=_halvings,
        channels=_latent_channels,
        scaling=_shifted,
        frames=_cogvideox_frames,
    ),
    # Wan 2.1, and 2.2 with patches of 2 x 2 pixels
    "AutoencoderKLWan": Conventions(
        takes="clips",
        arithmetic_keys=(
            *_CAUSAL_KEYS, "base_dim", "decoder_base_dim", "in_channels", "is_residual", "out_channels", "patch_size"
        ),
        factor=_wan_factor,
        channels=lambda vae: int(vae.config.z_dim),
        scaling=_of_config,
        frames=_wan_frames,
        pixel_channels=lambda vae: vae.config.in_channels // (vae.config.patch_size or 1) ** 2,
    ),
    "AutoencoderKLHunyuanVideo": Conventions(
        takes="clips",
        arithmetic_keys=(
            "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
            "mid_block_add_attention", "norm_num_groups", "out_channels", "scaling_factor",
            "spatial_compression_ratio", "temporal_compression_ratio", "up_block_types",
        ),
        factor=_spatial_ratio,
        channels=_latent_channels,
        scaling=_scalar,
        frames=_temporal_ratio,
    ),
    "AutoencoderKLHunyuanVideo15": Conventions(
        takes="clips",
        arithmetic_keys=(
            "block_out_channels", "downsample_match_channel", "in_channels", "latent_channels", "layers_per_block",
            "out_channels", "scaling_factor", "spatial_compression_ratio", "temporal_compression_ratio",
            "upsample_match_channel",
        ),
        factor=_spatial_ratio,
        channels=_latent_channels,
        scaling=_scalar,
        frames=_temporal_ratio,
    ),
    "AutoencoderKLLTXVideo": Conventions(
        takes="clips",
        arithmetic_keys=(
            "block_out_channels", "decoder_block_out_channels", "decoder_causal", "decoder_inject_noise",
            "decoder_layers_per_block", "decoder_spatio_temporal_scaling", "down_block_types", "downsample_type",
            "encoder_causal", "in_channels", "latent_channels", "layers_per_block", "out_channels", "patch_size",
            "patch_size_t", "resnet_norm_eps", "scaling_factor", "spatial_compression_ratio",
            "spatio_temporal_scaling", "temporal_compression_ratio", "timestep_conditioning", "upsample_factor",
            "upsample_residual",
        ),
        factor=_spatial_ratio,
        channels=_latent_channels,
        scaling=_ltx,
        decode=_decode_ltx,
        frames=_ltx_frames,
    ),
    "AutoencoderKLMochi": Conventions(
        takes="clips",
        arithmetic_keys=(
            "act_fn", "add_attention_block", "decoder_block_out_channels", "encoder_block_out_channels", "in_channels",
            "latent_channels", "latents_mean", "latents_std", "layers_per_block", "out_channels", "scaling_factor",
            "spatial_expansions", "temporal_expansions",
        ),
        factor=lambda vae: math.prod(vae.config.spatial_expansions),
        channels=_latent_channels,
        scaling=_mochi,
        frames=lambda vae: FrameRule(math.prod(vae.config.temporal_expansions)),
        pixel_channels=lambda vae: vae.config.out_channels,
    ),
}  # fmt: skip
