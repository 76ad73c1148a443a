from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from pomscale.codecs import build_codec
from pomscale.codecs.base import ClipCodec
from pomscale.config.codecs import Uint8CodecConfig
from pomscale.config.encode import EncodeRecipe
from pomscale.data.normalize import normalize
from pomscale.shards.schema import Normalization


@pytest.mark.parametrize("channels", [1, 3])
def test_every_byte_survives(channels: int) -> None:
    codec = build_codec(Uint8CodecConfig(name="uint8", channels=channels))
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, channels, 1, 1)
    assert codec.latent_shape(16, 16) == tuple(pixels.shape[1:])
    latents = codec.encode(pixels / 255.0)
    assert torch.equal(latents, pixels.float())
    assert torch.equal((codec.decode(latents) * 255).round().byte(), pixels)
    assert not isinstance(codec, ClipCodec)


def test_a_network_sees_minus_one_to_one() -> None:
    codec = build_codec(Uint8CodecConfig(name="uint8"))
    seen = Normalization((codec.shift,) * 3, (1.0 / codec.scaling_factor,) * 3)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    normalised = normalize(pixels, seen)
    assert (normalised.min().item(), normalised.max().item()) == (-1.0, 1.0)
    torch.testing.assert_close(normalised, 2.0 * (pixels.float() / 255.0) - 1.0, rtol=0, atol=2e-7)


def test_values_outside_are_cut_when_they_are_decoded() -> None:
    codec = build_codec(Uint8CodecConfig(name="uint8", channels=1))
    shown = codec.decode(torch.tensor([-30.0, 0.0, 255.0, 300.0]).reshape(1, 1, 2, 2))
    assert shown.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]


def test_the_coding_changes_no_pixel_and_so_no_identity() -> None:
    configs = [Uint8CodecConfig(name="uint8", channels=c, coding=coding) for c in (1, 3) for coding in ("raw", "png")]
    identities = [build_codec(config).identity() for config in configs]
    assert identities[0] == identities[1] != identities[2] == identities[3]


def recipe(**changes: object) -> EncodeRecipe:
    values = {
        "kind": "encode",
        "name": "x",
        "output": "out",
        "source": {"kind": "image_folder", "path": "in"},
        "codec": {"name": "uint8"},
        "transform": {"size": 16},
    }
    return EncodeRecipe.model_validate(values | changes)


def test_clips_and_buckets_of_adm_are_refused() -> None:
    assert recipe().codec is not None
    with pytest.raises(ValidationError, match="uint8 takes a transform of kind image"):
        recipe(transform={"kind": "video"}, source={"kind": "video_folder", "path": "in"})
    with pytest.raises(ValidationError, match="filter: adm cuts out squares"):
        recipe(transform={"buckets": [[16, 32]], "filter": "adm"})
    assert recipe(transform={"sizes": [8, 16], "filter": "adm"}).transform is not None
