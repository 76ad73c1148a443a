"""Clips that are encoded in slices: the network's own latents but for rounding, in at most half of the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pomscale.codecs.encode_slices import SLICED_ENCODERS
from support.encode_memory import PUBLISHED, peaks
from support.tiny_vaes import make_tiny_vae

_LTX_095 = {
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "block_out_channels": (8, 16, 16, 16, 16),
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "spatio_temporal_scaling": (True,) * 4,
    "layers_per_block": (1,) * 5,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ltx", {}),
        ("ltx", _LTX_095),
        ("ltx", {"encoder_causal": False}),
        ("hunyuan_video_15", {"layers_per_block": 2}),
        ("hunyuan_video", {"layers_per_block": 2, "block_out_channels": (8, 8, 16, 16)}),
        ("mochi", {"layers_per_block": (2, 1, 2, 1, 1)}),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@torch.no_grad()
def test_slices_give_the_networks_own_latents(
    name: str, changes: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    vae = make_tiny_vae(name, **changes).to(dtype)
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    encode = SLICED_ENCODERS[type(vae).__name__]
    for periods in (0, 1, 3, 4):
        frames = 1 + periods * vae.temporal_compression_ratio
        clip = torch.rand(1, 3, frames, 32, 64, generator=torch.Generator().manual_seed(frames)).to(dtype) * 2 - 1
        expected = vae.encode(clip).latent_dist.parameters
        found = encode(vae, clip.clone())
        assert found.shape == expected.shape
        # Norms of LTX and Fourier features of Mochi are in float32 in any case.
        coarse = name in ("ltx", "mochi")
        scale = expected.abs().max()
        assert (found - expected).abs().max() <= (1e-5 if coarse else tolerance) * scale
        assert vae.encode(clip).latent_dist.parameters.equal(expected), "the network is not as it was"


@torch.no_grad()
def test_an_encode_that_fails_leaves_the_network_as_it_was() -> None:
    for name in ("ltx", "hunyuan_video_15", "hunyuan_video", "mochi"):
        vae = make_tiny_vae(name)
        with pytest.raises(RuntimeError):
            SLICED_ENCODERS[type(vae).__name__](vae, torch.rand(1, 4, 25, 32, 64))
        for module in vae.modules():
            assert "forward" not in vars(module)
            assert not module._forward_pre_hooks


@pytest.mark.parametrize("name", PUBLISHED)
def test_slices_take_at_most_half_of_the_memory_of_all_frames_at_once(name: str) -> None:
    """Published sizes, 80 frames or the next that fit, 256x384: `python -m support.encode_memory` has the figures."""
    plain, sliced = peaks(name)
    assert sliced <= 0.5 * plain
