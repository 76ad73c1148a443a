"""A real AutoencoderKL of diffusers, small enough for tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def save_vae(folder: Path, seed: int) -> Path:
    """Random weights that depend on the seed alone; 2x downsampling, 4 channels. Skips the test without diffusers."""
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
