"""Real networks of diffusers and transformers, small enough for tests, with random weights that depend on a seed alone.

Without the package, the test is skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


def save_vae(folder: Path, seed: int) -> Path:
    """An AutoencoderKL: 2x downsampling, 4 channels."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.5,
        )
    vae.save_pretrained(folder)
    return folder


def save_video_vae(folder: Path, seed: int, **changes: Any) -> Path:
    """An AutoencoderKLCogVideoX: 4x downsampling in time as in space, 4 channels. Tiles of 24x40 pixels if enabled.

    `changes` are arguments of the network's constructor.
    """
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        arguments = {
            "block_out_channels": (8, 8, 8),
            "down_block_types": ("CogVideoXDownBlock3D",) * 3,
            "up_block_types": ("CogVideoXUpBlock3D",) * 3,
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "sample_height": 48,
            "sample_width": 80,
            "scaling_factor": 0.7,
        }
        vae = diffusers.AutoencoderKLCogVideoX(**arguments | changes)
    vae.save_pretrained(folder)
    return folder
