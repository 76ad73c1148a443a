"""Codec vae on the networks of SD and CogVideoX: loading, moments, samples, decode, identity, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pomscale.base.errors import InputError
from pomscale.codecs import build_codec
from pomscale.config.codecs import VaeCodecConfig
from support.tiny_models import save_vae, save_video_vae


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"), seed=0)


def random_images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def sd_vae(folder: Path, **changes: object) -> VaeCodecConfig:
    return VaeCodecConfig.model_validate({"name": "vae", "path": str(folder)} | changes)


def test_sd_vae_moments_sample_and_decode(vae_folder: Path) -> None:
    images = random_images(10, 3, 16, 24)  # more than are decoded at once
    codec = build_codec(sd_vae(vae_folder))
    moments = codec.encode(images)
    assert codec.latent_shape(16, 24) == (4, 8, 12)
    assert codec.stores_moments
    assert moments.shape == (10, 8, 8, 12)

    mean, logvar = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    sampled = build_codec(sd_vae(vae_folder, store="sample"))
    assert sampled.needs_noise
    torch.testing.assert_close(sampled.encode(images, noise), mean + (0.5 * logvar).exp() * noise)

    decoded = codec.decode(mean)
    assert decoded.shape == images.shape
    assert 0.0 <= decoded.min() <= decoded.max() <= 1.0
    reference = (codec.vae.decode(mean).sample.detach() + 1) / 2  # type: ignore[attr-defined]
    torch.testing.assert_close(decoded, reference.clamp(0, 1))


def test_sd_vae_bf16_is_close_to_fp32(vae_folder: Path) -> None:
    images = random_images(2, 3, 16, 16)
    exact = build_codec(sd_vae(vae_folder)).encode(images)
    rough = build_codec(sd_vae(vae_folder, precision="bf16")).encode(images)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0.05)


def test_sd_vae_identity_follows_weights_not_the_folder(vae_folder: Path, tmp_path: Path) -> None:
    codec = build_codec(sd_vae(vae_folder))
    codec.vae.save_pretrained(tmp_path / "copy")  # type: ignore[attr-defined]
    assert build_codec(sd_vae(tmp_path / "copy")).identity() == codec.identity()
    # What is stored is the recipe's business; any of it is decoded by the same network.
    for change in ({"store": "sample"}, {"precision": "bf16"}):
        assert build_codec(sd_vae(vae_folder, **change)).identity() == codec.identity()
    with torch.no_grad():
        next(codec.vae.parameters()).view(-1)[0] += 1e-3  # type: ignore[attr-defined]
    assert build_codec(sd_vae(vae_folder)).identity() != codec.identity()


def test_weights_do_not_change_with_the_file_they_were_read_from(tmp_path: Path) -> None:
    """safetensors maps it; a copy over it in place is in the mapping at once."""
    (path,) = save_vae(tmp_path, seed=0).glob("*.safetensors")
    codec = build_codec(sd_vae(tmp_path)).to("cpu")
    identity = codec.identity()
    with path.open("r+b") as file:
        file.seek(-4000, 2)
        file.write(bytes(4000))
    assert codec.identity() == identity
    assert build_codec(sd_vae(tmp_path)).to("cpu").identity() != identity


def test_sd_vae_in_a_subfolder_as_in_a_whole_pipeline(vae_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(vae_folder, tmp_path / "pipeline" / "vae")
    found = build_codec(sd_vae(tmp_path / "pipeline", subfolder="vae"))
    assert found.identity() == build_codec(sd_vae(vae_folder)).identity()


def test_a_class_that_is_not_known_is_named_with_those_that_are(vae_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(vae_folder, tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "VQModel"}))
    with pytest.raises(
        InputError, match=r"holds an VQModel, .* knows AutoencoderKL, .*, AutoencoderKLMochi"
    ) as problem:
        build_codec(sd_vae(tmp_path / "vae"))
    assert len(str(problem.value)) < 600
    path.write_text("{}")
    with pytest.raises(InputError, match=r"holds a config\.json without _class_name"):
        build_codec(sd_vae(tmp_path / "vae"))
    with pytest.raises(InputError, match=r"cannot load an autoencoder .* whole pipeline, set codec\.subfolder"):
        build_codec(sd_vae(tmp_path))


def test_weights_of_another_size_take_a_few_lines(vae_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(vae_folder, tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_out_channels": [16, 32]}))
    with pytest.raises(InputError, match=r"codec\.path: ") as problem:
        build_codec(sd_vae(tmp_path / "vae"))
    assert len(str(problem.value)) < 1000


def test_sd_vae_identity_does_not_know_the_version_of_diffusers(vae_folder: Path) -> None:
    codec = build_codec(sd_vae(vae_folder))
    identity = codec.identity()
    codec.vae.register_to_config(a_key_of_a_later_version=1, force_upcast=False)  # type: ignore[attr-defined]
    assert codec.identity() == identity
    codec.vae.register_to_config(mid_block_add_attention=False)  # type: ignore[attr-defined]
    assert codec.identity() != identity


@pytest.mark.parametrize(("change", "told"), [("remove", "missing_keys"), ("add", "unexpected_keys"), ("cut", "shape")])
def test_sd_vae_refuses_weights_that_do_not_fit(vae_folder: Path, tmp_path: Path, change: str, told: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    shutil.copytree(vae_folder, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.glob("*.safetensors")
    weights = safetensors.load_file(path)
    if change == "remove":
        del weights["decoder.conv_in.bias"]
    elif change == "add":
        weights["decoder.conv_between.bias"] = torch.zeros(1)
    else:
        weights["decoder.conv_in.bias"] = torch.zeros(1)
    safetensors.save_file(weights, path)
    with pytest.raises(
        InputError, match=rf"(?s)codec\.path.*{told}.*decoder\.conv_|codec\.path.*decoder\.conv_in.*{told}"
    ):
        build_codec(sd_vae(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_out_channels", None), ("latent_channels", "4"), ("norm_num_groups", 0), ("scaling_factor", None)],
)
def test_sd_vae_refuses_a_wrong_config(vae_folder: Path, tmp_path: Path, key: str, value: object) -> None:
    shutil.copytree(vae_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match=r"codec\.path: cannot load"):
        build_codec(sd_vae(tmp_path))


def test_without_diffusers_the_cause_and_the_command_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pomscale.codecs.vae", raising=False)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"diffusers.*import of diffusers halted.*pip install -e '\.\[vae\]'"):
        build_codec(VaeCodecConfig(name="vae", path="p"))


def test_sd_vae_refuses_bad_folders_and_sizes(vae_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"codec\.path.*no-such-folder"):
        build_codec(sd_vae(tmp_path / "no-such-folder"))
    (tmp_path / "config.json").write_text("{ this is no json")
    with pytest.raises(InputError, match=r"codec\.path"):
        build_codec(sd_vae(tmp_path))
    with pytest.raises(InputError, match="multiple of 2"):
        build_codec(sd_vae(vae_folder)).encode(torch.zeros(1, 3, 15, 16))


def test_decode_of_numpy_made_latents_needs_no_grad(vae_folder: Path) -> None:
    codec = build_codec(sd_vae(vae_folder))
    decoded = codec.decode(torch.from_numpy(np.zeros((1, 4, 4, 4), np.float32)))
    assert not decoded.requires_grad


@pytest.fixture(scope="module")
def video_vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As CogVideoX lies on the hub: the VAE in a folder inside the model's."""
    folder = tmp_path_factory.mktemp("video")
    save_video_vae(folder / "vae", seed=0)
    return folder


def video_vae(folder: Path, **changes: object) -> VaeCodecConfig:
    settings = {"name": "vae", "path": str(folder), "subfolder": "vae", "store": "moments"}
    return VaeCodecConfig.model_validate(settings | changes)


@pytest.mark.parametrize("frames", [1, 8, 9, 16, 17, 24, 80, 81])
def test_video_vae_shape_is_that_of_the_network_and_lengths_come_back(video_vae_folder: Path, frames: int) -> None:
    codec = build_codec(video_vae(video_vae_folder))
    clips = random_images(1, 3, frames, 8, 12)
    moments = codec.encode(clips)
    latent_shape = codec.latent_shape(frames, 8, 12)
    assert moments.shape == (1, 2 * latent_shape[0], *latent_shape[1:])
    decoded = codec.decode(moments.chunk(2, dim=1)[0])
    assert decoded.shape == clips.shape
    assert 0.0 <= decoded.min() <= decoded.max() <= 1.0


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((84, 240, 384), "81 or 88 x 240 x 384"),
        ((5, 240, 384), "1 or 8 x 240 x 384"),
        ((80, 242, 3), "80 x 240 or 244 x 4"),
    ],
)
def test_video_vae_names_the_nearest_sizes_that_fit(
    video_vae_folder: Path, size: tuple[int, int, int], nearest: str
) -> None:
    codec = build_codec(video_vae(video_vae_folder))
    with pytest.raises(InputError, match=rf"clips of {size[0]} x {size[1]} .* nearest are {nearest}; change"):
        codec.latent_shape(*size)
    with pytest.raises(InputError, match="nearest"):
        codec.encode(torch.zeros(1, 3, 10, 8, 8))


def test_video_vae_carries_nothing_from_clip_to_clip(video_vae_folder: Path) -> None:
    codec = build_codec(video_vae(video_vae_folder))
    clips = random_images(3, 3, 17, 8, 8)
    together = codec.encode(clips)
    for clip, moments in zip(clips, together, strict=True):
        assert torch.equal(codec.encode(clip[None])[0], moments)
    latents = together.chunk(2, dim=1)[0]
    decoded = codec.decode(latents)
    for latent, clip in zip(latents.flip(0), decoded.flip(0), strict=True):
        assert torch.equal(codec.decode(latent[None])[0], clip)


@pytest.mark.parametrize("store", ["moments", "sample"])
def test_video_vae_takes_pictures_as_clips_of_one_frame(video_vae_folder: Path, store: str) -> None:
    codec = build_codec(video_vae(video_vae_folder, store=store))
    pictures = random_images(2, 3, 8, 12)
    channels, height, width = codec.latent_shape(8, 12)
    noise = torch.randn(2, channels, height, width) if codec.needs_noise else None
    stored = codec.encode(pictures, noise)
    clips = codec.encode(pictures[:, :, None], None if noise is None else noise[:, :, None])
    assert stored.equal(clips[:, :, 0])
    latents = stored[:, :channels]
    decoded = codec.decode(latents)
    assert decoded.shape == pictures.shape
    assert decoded.equal(codec.decode(latents[:, :, None])[:, :, 0])
    with pytest.raises(InputError, match=r"8 x 14 .* nearest are 1 x 8 x 12 or 16"):
        codec.latent_shape(8, 14)


def test_video_vae_sample_precision_and_identity(video_vae_folder: Path, tmp_path: Path) -> None:
    clips = random_images(2, 3, 8, 8, 8)
    codec = build_codec(video_vae(video_vae_folder))
    assert (codec.scaling_factor, codec.shift, codec.num_channels_in) == (0.7, 0.0, 3)
    mean, logvar = codec.encode(clips).chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    sampled = build_codec(video_vae(video_vae_folder, store="sample", precision="bf16"))
    assert sampled.needs_noise
    assert not sampled.stores_moments
    rough = sampled.encode(clips, noise)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, mean + (0.5 * logvar).exp() * noise, atol=0.05, rtol=0.05)

    assert sampled.identity() == codec.identity()
    assert build_codec(video_vae(save_video_vae(tmp_path, seed=1), subfolder="")).identity() != codec.identity()


def test_video_vae_tiles(video_vae_folder: Path, tmp_path: Path) -> None:
    """Tiles of 24x40 pixels: a clip of one tile is encoded as without them; of several, to about the same latent."""
    whole, tiled = (build_codec(video_vae(video_vae_folder, tiling=tiling)) for tiling in (False, True))
    clips = random_images(1, 3, 8, 24, 40)
    assert torch.equal(tiled.encode(clips), whole.encode(clips))
    clips = random_images(1, 3, 8, 48, 72)
    moments = tiled.encode(clips)
    assert moments.shape == whole.encode(clips).shape
    assert not torch.equal(moments, whole.encode(clips))
    assert tiled.decode(moments.chunk(2, dim=1)[0]).shape == clips.shape

    save_video_vae(tmp_path, seed=0, sample_width=50)
    build_codec(video_vae(tmp_path, subfolder=""))
    with pytest.raises(InputError, match=r"sample_width.*set codec\.tiling=false"):
        build_codec(video_vae(tmp_path, subfolder="", tiling=True))


def test_video_vae_refuses_networks_that_it_cannot_run(video_vae_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"codec\.path: cannot load an autoencoder from .*no-such-folder"):
        build_codec(video_vae(video_vae_folder, subfolder="no-such-folder"))
    save_video_vae(tmp_path, seed=0, temporal_compression_ratio=2)
    with pytest.raises(InputError, match="temporal_compression_ratio is 2"):
        build_codec(video_vae(tmp_path, subfolder=""))


# Keys of the identities that datasets of earlier versions carry.
_FORMER_KEYS = (
    "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
    "norm_num_groups", "out_channels", "scaling_factor", "shift_factor", "up_block_types", "use_post_quant_conv",
    "use_quant_conv",
)  # fmt: skip


def test_identities_are_those_of_datasets_that_earlier_versions_made(vae_folder: Path, video_vae_folder: Path) -> None:
    for config, label, key in (
        (sd_vae(vae_folder), "sd_vae", "mid_block_add_attention"),
        (video_vae(video_vae_folder), "cogvideox_vae", "temporal_compression_ratio"),
    ):
        codec: Any = build_codec(config)
        settings = {name: codec.vae.config[name] for name in (*_FORMER_KEYS, key)}
        digest = hashlib.sha256(f"{label} {json.dumps(settings, sort_keys=True)}".encode())
        for name, tensor in sorted(codec.vae.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy())
        assert codec.identity() == digest.hexdigest()
