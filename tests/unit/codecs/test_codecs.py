from __future__ import annotations

import pytest
import torch

from pomscale.base.errors import InputError
from pomscale.codecs import build_codec
from pomscale.codecs.pixel import PixelCodec
from pomscale.config.codecs import PixelCodecConfig


@pytest.mark.parametrize(("block", "channels"), [(1, 3), (2, 1), (4, 3)])
def test_pixel_is_exact_for_every_8_bit_value_after_fp16(block: int, channels: int) -> None:
    codec = build_codec(PixelCodecConfig(name="pixel", block=block, channels=channels))
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, channels, 16, 16)
    stored = codec.encode(values.float() / 255).half()
    assert stored.shape[1:] == codec.latent_shape(16, 16)
    assert torch.equal((codec.decode(stored.float()) * 255).round().to(torch.uint8), values)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_takes_clips_frame_by_frame_also_in_chunks(channels: int) -> None:
    codec = build_codec(PixelCodecConfig(name="pixel", block=2, channels=channels))
    assert isinstance(codec, PixelCodec)
    clips = torch.rand(2, channels, 5, 6, 8)
    latents = codec.encode(clips)
    assert latents.shape[1:] == codec.latent_shape(5, 6, 8) == (4 * channels, 5, 3, 4)
    for frame in range(5):
        assert torch.equal(latents[:, :, frame], codec.encode(clips[:, :, frame]))
    torch.testing.assert_close(codec.decode(latents), clips)
    decoder = codec.decoder(codec.num_pixel_frames(3))
    chunks = [decoder.decode(chunk) for chunk in latents.split([3, 2], dim=2)]
    assert torch.equal(torch.cat(chunks, dim=2), codec.decode(latents))


def test_pixel_refuses_sizes_that_do_not_fold() -> None:
    codec = build_codec(PixelCodecConfig(name="pixel", block=2, channels=1))
    with pytest.raises(InputError, match=r"7x8 pixels.*multiples of codec\.block"):
        codec.encode(torch.zeros(1, 1, 7, 8))


def test_pixel_identity_depends_on_what_changes_the_latents() -> None:
    configs = [PixelCodecConfig(name="pixel", block=b, channels=c) for b in (1, 2) for c in (1, 3)]
    assert len({build_codec(config).identity() for config in configs}) == 4
