"""Small networks of every autoencoder class that codec `vae` takes, with random weights that depend on a seed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.tiny_models import VIDEO_VAE

_KL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
_CAUSAL = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [-0.7, 0.1, 1.5, -0.3],
    "latents_std": [2.8, 1.4, 0.6, 1.1],
}
_DC = {
    "latent_channels": 8,
    "attention_head_dim": 4,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_layers_per_block": (1,) * 6,
    "decoder_layers_per_block": (1,) * 6,
    "encoder_qkv_multiscales": ((),) * 6,
    "decoder_qkv_multiscales": ((),) * 6,
    "encoder_block_out_channels": (8,) * 6,
    "decoder_block_out_channels": (8,) * 6,
    "scaling_factor": 0.41407,
}
_HUNYUAN = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
_LTX = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
}

# name: (class of diffusers, arguments of its constructor)
TINY_VAES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("AutoencoderKL", _KL | {"scaling_factor": 0.5}),
    "sdxl_with_statistics": (
        "AutoencoderKL",
        _KL | {"scaling_factor": 0.5, "latents_mean": (-1.6, 1.1, 0.3, 2.0), "latents_std": (8.0, 6.0, 2.0, 4.0)},
    ),
    "flux1": (
        "AutoencoderKL",
        _KL
        | {
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    ),
    "flux2": ("AutoencoderKLFlux2", _KL | {"sample_size": 64}),
    "qwen_image": ("AutoencoderKLQwenImage", _CAUSAL),
    "dc_32": ("AutoencoderDC", _DC),
    "dc_64": (
        "AutoencoderDC",
        _DC
        | {
            key: (*_DC[key], _DC[key][-1])
            for key in (
                "encoder_layers_per_block",
                "decoder_layers_per_block",
                "encoder_qkv_multiscales",
                "decoder_qkv_multiscales",
                "encoder_block_out_channels",
                "decoder_block_out_channels",
            )
        },
    ),
    "tiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8),
            "num_encoder_blocks": (1, 1, 1),
            "num_decoder_blocks": (1, 1, 1),
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
    ),
    "rae": (
        "AutoencoderRAE",
        {
            "encoder_hidden_size": 64,
            "encoder_patch_size": 14,
            "encoder_num_hidden_layers": 1,
            "encoder_input_size": 28,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
            "patch_size": 16,
            "latents_mean": [[[0.1 * c]] for c in range(64)],
            "latents_std": [[[1.0 + 0.1 * c]] for c in range(64)],
            "scaling_factor": 0.7,
        },
    ),
    "cogvideox": ("AutoencoderKLCogVideoX", VIDEO_VAE),
    "wan21": ("AutoencoderKLWan", _CAUSAL),
    "wan22": (
        "AutoencoderKLWan",
        _CAUSAL
        | {
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "decoder_base_dim": 12,
        },
    ),
    "hunyuan_video": ("AutoencoderKLHunyuanVideo", _HUNYUAN | {"scaling_factor": 0.476986}),
    "hunyuan_video_15": (
        "AutoencoderKLHunyuanVideo15",
        {
            "latent_channels": 4,
            "block_out_channels": (8, 8, 16, 16, 16),
            "layers_per_block": 1,
            "scaling_factor": 1.03682,
        },
    ),
    "ltx": ("AutoencoderKLLTXVideo", _LTX | {"scaling_factor": 1.25}),
    "ltx_with_time": (
        "AutoencoderKLLTXVideo",
        _LTX | {"timestep_conditioning": True, "decoder_inject_noise": (True, True, False, False, False)},
    ),
    "mochi": (
        "AutoencoderKLMochi",
        {
            "encoder_block_out_channels": (32, 32, 64, 64),
            "decoder_block_out_channels": (32, 32, 64, 64),
            "layers_per_block": (1, 1, 1, 1, 1),
            "scaling_factor": 1.25,
        },
    ),
}

PICTURE_VAES = [name for name in TINY_VAES if name in list(TINY_VAES)[:9]]
CLIP_VAES = [name for name in TINY_VAES if name not in PICTURE_VAES]

# (height, width), or (frames, height, width), that the networks take: small ones.
SIZES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("sd", "sdxl_with_statistics", "flux1", "flux2", "tiny"), (16, 24)),
    "qwen_image": (16, 24),
    "dc_32": (32, 64),
    "dc_64": (64, 128),
    "rae": (32, 32),
    "cogvideox": (9, 8, 12),
    "wan21": (9, 16, 24),
    "wan22": (9, 32, 48),
    "hunyuan_video": (9, 16, 24),
    "hunyuan_video_15": (9, 32, 48),
    "ltx": (17, 32, 64),
    "ltx_with_time": (17, 32, 64),
    "mochi": (13, 16, 24),
}


def make_tiny_vae(name: str, seed: int = 0, **changes: Any) -> Any:
    """Return the network of a name; `changes` are further arguments of its constructor.

    Buffers with statistics of latents, which a fresh network has at 0 and 1, get others.
    """
    diffusers = pytest.importorskip("diffusers")
    class_name, arguments = TINY_VAES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = getattr(diffusers, class_name)(**arguments | changes)
        for buffers in ("bn.running_mean", "latents_mean", "bn.running_var", "latents_std"):
            if buffers in dict(vae.named_buffers()):
                buffer = vae.get_buffer(buffers)
                buffer.copy_(torch.rand_like(buffer) + (0.0 if "mean" in buffers else 0.5))
        for name_, parameter in vae.named_parameters():
            if "per_channel_scale" in name_:  # zeros: no noise
                parameter.data.fill_(0.1)
    return vae.eval()


def save_tiny_vae(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """Save the network of a name as `save_pretrained` does."""
    make_tiny_vae(name, seed, **changes).save_pretrained(folder)
    return folder
