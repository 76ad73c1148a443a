"""Every autoencoder class: what training sees is what diffusers' pipelines hand to their networks, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.codecs import build_codec
from pomscale.codecs.base import ClipCodec
from pomscale.codecs.vae import ClipVae, PictureVae
from pomscale.codecs.vae_conventions import CONVENTIONS, FrameRule
from pomscale.config.codecs import VaeCodecConfig
from pomscale.data.normalize import normalize
from pomscale.shards.schema import Normalization
from support.tiny_vaes import CLIP_VAES, PICTURE_VAES, SIZES, TINY_VAES, make_tiny_vae, save_tiny_vae

each_vae = pytest.mark.parametrize("name", TINY_VAES)
each_clip_vae = pytest.mark.parametrize("name", CLIP_VAES)


def open_tiny(folder: Path, name: str, **changes: Any) -> Any:
    """The codec of a network that is saved as in a whole pipeline; `changes` are fields of the recipe."""
    path = folder / name
    if not path.exists():
        save_tiny_vae(path / "vae", name)
    return build_codec(VaeCodecConfig.model_validate({"name": "vae", "path": str(path), "subfolder": "vae"} | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vaes")


def random_media(name: str, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *SIZES[name], generator=torch.Generator().manual_seed(0))


def of_channels(values: Any, ndim: int) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).view(1, -1, *[1] * (ndim - 2))


def scaled(vae: Any, z: Tensor) -> Tensor:
    return (z - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def unscaled(vae: Any, z: Tensor) -> Tensor:
    return z / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)


def standardised(vae: Any, z: Tensor) -> Tensor:
    """As pipeline_wan_video2video.py and pipeline_qwenimage_img2img.py: times the inverse of the std."""
    mean, std = of_channels(vae.config.latents_mean, z.ndim), 1.0 / of_channels(vae.config.latents_std, z.ndim)
    return (z - mean) * std


def unstandardised(vae: Any, z: Tensor) -> Tensor:
    mean, std = of_channels(vae.config.latents_mean, z.ndim), 1.0 / of_channels(vae.config.latents_std, z.ndim)
    return z / std + mean


def scaled_and_standardised(vae: Any, z: Tensor) -> Tensor:
    """The inverse of what pipeline_stable_diffusion_xl.py and pipeline_mochi.py do before they decode."""
    mean, std = of_channels(vae.config.latents_mean, z.ndim), of_channels(vae.config.latents_std, z.ndim)
    return (z - mean) * vae.config.scaling_factor / std


def unscaled_and_unstandardised(vae: Any, z: Tensor) -> Tensor:
    mean, std = of_channels(vae.config.latents_mean, z.ndim), of_channels(vae.config.latents_std, z.ndim)
    return z * std / vae.config.scaling_factor + mean


def of_ltx(vae: Any, z: Tensor, name: str) -> Tensor:
    from diffusers import LTXPipeline  # noqa: PLC0415 (seconds, for this class alone)

    return getattr(LTXPipeline, name)(z, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)


def of_flux2(vae: Any, z: Tensor) -> Tensor:
    """`_encode_vae_image` of their pipeline, on latents that are there already."""
    from diffusers import Flux2Pipeline  # noqa: PLC0415

    encoding = SimpleNamespace(encode=lambda _: SimpleNamespace(latents=z), bn=vae.bn, config=vae.config)
    pipeline = SimpleNamespace(vae=encoding, _patchify_latents=Flux2Pipeline._patchify_latents)
    return Flux2Pipeline._encode_vae_image(pipeline, z, generator=None)


def from_flux2(vae: Any, z: Tensor) -> Tensor:
    from diffusers import Flux2Pipeline  # noqa: PLC0415

    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return Flux2Pipeline._unpatchify_latents(z * std + vae.bn.running_mean.view(1, -1, 1, 1))


def plain(_: Any, z: Tensor) -> Tensor:
    return z


# name: (latents of the network -> what the pipeline's network sees, and back), after the pipelines' sources.
Convert = Callable[[Any, Tensor], Tensor]
PIPELINES: dict[str, tuple[Convert, Convert]] = {
    **dict.fromkeys(("sd", "flux1", "dc_32", "dc_64", "tiny"), (scaled, unscaled)),
    **dict.fromkeys(("cogvideox", "hunyuan_video", "hunyuan_video_15"), (scaled, unscaled)),
    **dict.fromkeys(("sdxl_with_statistics", "mochi"), (scaled_and_standardised, unscaled_and_unstandardised)),
    **dict.fromkeys(("qwen_image", "wan21", "wan22"), (standardised, unstandardised)),
    **dict.fromkeys(
        ("ltx", "ltx_with_time"),
        (lambda vae, z: of_ltx(vae, z, "_normalize_latents"), lambda vae, z: of_ltx(vae, z, "_denormalize_latents")),
    ),
    "flux2": (of_flux2, from_flux2),
    "rae": (plain, plain),
}


def reference_encode(vae: Any, media: Tensor, name: str) -> Tensor:
    """The most likely latents by the network itself, as `retrieve_latents(..., sample_mode="argmax")` takes them."""
    pixels = media if name == "rae" else 2.0 * media - 1.0
    out = vae.encode(pixels[:, :, None] if name == "qwen_image" else pixels, return_dict=False)[0]
    return out if isinstance(out, Tensor) else out.mode()


def reference_decode(vae: Any, latents: Tensor, name: str) -> Tensor:
    if name == "ltx_with_time":
        torch.manual_seed(0)
        pixels = vae.decode(latents, torch.zeros(len(latents)), return_dict=False)[0]
    else:
        pixels = vae.decode(latents, return_dict=False)[0]
    pixels = pixels[:, :, 0] if name == "qwen_image" else pixels
    return (pixels if name == "rae" else (pixels + 1.0) / 2.0).clamp(0.0, 1.0)


@each_vae
@torch.no_grad()
def test_training_sees_what_the_pipelines_network_sees_and_it_decodes_alike(folder: Path, name: str) -> None:
    deterministic = not CONVENTIONS[TINY_VAES[name][0]].has_posterior
    codec = open_tiny(folder, name, store=None if deterministic else "moments")
    assert isinstance(codec, ClipCodec) == (name in CLIP_VAES)
    vae = make_tiny_vae(name)
    for switch in ("use_framewise_encoding", "use_framewise_decoding"):
        if hasattr(vae, switch):
            setattr(vae, switch, False)
    media = random_media(name)
    stored = codec.encode(media)
    shape = codec.latent_shape(*SIZES[name])
    assert stored.shape == (2, shape[0] * (1 if deterministic else 2), *shape[1:])
    latents = stored[:, : shape[0]]
    normalization = Normalization.by_codec(codec.shift, codec.scaling_factor, shape[0])
    seen = normalize(latents, normalization)

    to_network, from_network = PIPELINES[name]
    reference = torch.cat([reference_encode(vae, one, name) for one in media.split(1)])
    expected = to_network(vae, reference)
    expected = expected[:, :, 0] if name == "qwen_image" else expected
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)

    unscaled_ = seen * of_channels(normalization.std, seen.ndim) + of_channels(normalization.mean, seen.ndim)
    given = from_network(vae, seen[:, :, None] if name == "qwen_image" else seen)
    decoded = torch.cat([reference_decode(vae, one, name) for one in given.split(1)])
    torch.testing.assert_close(codec.decode(unscaled_), decoded, rtol=1e-4, atol=1e-5)
    assert decoded.shape == media.shape


@each_vae
def test_a_network_is_the_same_by_path_and_in_a_pipeline(folder: Path, name: str) -> None:
    inside = open_tiny(folder, name)
    alone = build_codec(VaeCodecConfig(name="vae", path=str(folder / name / "vae")))
    assert alone.identity() == inside.identity()
    assert inside.config.store == ("moments" if name in PICTURE_VAES and inside.conventions.has_posterior else "sample")


@each_vae
def test_a_draw_is_the_posteriors_and_a_deterministic_network_draws_nothing(folder: Path, name: str) -> None:
    sampled = open_tiny(folder, name, store="sample")
    media = random_media(name, batch=1)
    if not sampled.conventions.has_posterior:
        assert not sampled.needs_noise
        assert not sampled.stores_moments
        with pytest.raises(InputError, match=r"codec\.store: an Autoencoder\w+ is deterministic.*codec\.store=null"):
            open_tiny(folder, name, store="moments")
        return
    mean, logvar = open_tiny(folder, name, store="moments").encode(media).chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sampled.encode(media, noise), mean + (0.5 * logvar).exp() * noise)
    rough = open_tiny(folder, name, store="sample", precision="bf16").encode(media, noise)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, mean + (0.5 * logvar).exp() * noise, atol=0.15, rtol=0.15)


# Settings that change no arithmetic of a network in evaluation mode, or that others decide.
_NO_ARITHMETIC = {
    "dropout", "force_upcast", "sample_size", "sample_height", "sample_width", "latent_magnitude", "latent_shift",
    "noise_tau", "use_encoder_loss", "batch_norm_momentum", "invert_scale_latents", "encoder_norm_mean",
    "encoder_norm_std", "image_size", "scale_factor_temporal", "scale_factor_spatial", "reshape_to_2d", "norm_eps",
}  # fmt: skip
# These are in buffers, or were in no identity of the class from the first.
_ELSEWHERE = {
    "AutoencoderRAE": {"latents_mean", "latents_std"},
    "AutoencoderKLCogVideoX": {"latents_mean", "latents_std"},
}


@each_vae
def test_the_identity_changes_with_every_setting_of_the_arithmetic(folder: Path, name: str) -> None:
    codec = open_tiny(folder, name)
    vae, identity = codec.vae, codec.identity()
    keys = {*codec.conventions.arithmetic_keys, *codec.conventions.keys_if_set}
    settings = set(inspect.signature(type(vae).__init__).parameters) - {"self"}
    assert settings - keys == (settings & _NO_ARITHMETIC) | (_ELSEWHERE.get(codec.class_name, set()) & settings)
    for key in keys:
        before = vae.config[key]
        vae.register_to_config(**{key: "another"})
        assert codec.identity() != identity, key
        vae.register_to_config(**{key: before})
    assert codec.identity() == identity
    statistics = {"bn.running_mean", "bn.running_var", "latents_mean", "latents_std", "_latents_mean", "_latents_std"}
    for buffer_name, buffer in vae.named_buffers():
        if buffer_name in statistics:
            buffer.add_(1e-3)
            assert codec.identity() != identity, buffer_name
            buffer.sub_(1e-3)
    vae.register_to_config(a_key_of_a_later_version=1)
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1e-3
    assert codec.identity() != identity


@pytest.mark.parametrize("name", [name for name in PICTURE_VAES if name != "flux1"])
def test_clips_are_refused_by_a_codec_of_pictures(folder: Path, name: str) -> None:
    codec = open_tiny(folder, name)
    assert isinstance(codec, PictureVae)
    with pytest.raises(InputError, match=r"takes pictures, and no clips; set transform\.kind: image, or name an"):
        codec.latent_shape(9, *SIZES[name])
    height, width = SIZES[name]
    with pytest.raises(InputError, match=rf"{height + 1}x{width}.*change|{height + 1}x{width}; set transform\.size"):
        codec.latent_shape(height + 1, width)


@each_clip_vae
def test_pictures_are_clips_of_one_frame(folder: Path, name: str) -> None:
    codec = open_tiny(folder, name, store="moments")
    pictures = random_media(name)[:, :, 0]
    moments = codec.encode(pictures)
    assert moments.equal(codec.encode(pictures[:, :, None])[:, :, 0])
    latents = moments.chunk(2, dim=1)[0]
    assert latents.shape[1:] == codec.latent_shape(*pictures.shape[2:])
    assert codec.decode(latents).shape == pictures.shape


@pytest.mark.parametrize(
    ("name", "frames", "nearest"),
    [
        ("cogvideox", 84, "8k or 8k + 1 frames .* 81 or 88"),
        ("wan21", 80, "4k + 1 frames .* 77 or 81"),
        ("wan22", 2, "4k + 1 frames .* 1 or 5"),
        ("hunyuan_video", 83, "4k + 1 frames .* 81 or 85"),
        ("hunyuan_video_15", 8, "4k + 1 frames .* 5 or 9"),
        ("ltx", 80, "8k + 1 frames .* 73 or 81"),
        ("mochi", 81, "6k + 1 frames .* 79 or 85"),
    ],
)
def test_frames_that_do_not_come_back_are_refused_with_the_nearest(
    folder: Path, name: str, frames: int, nearest: str
) -> None:
    codec = open_tiny(folder, name)
    height, width = SIZES[name][1:]
    nearest = nearest.replace("+", r"\+")
    with pytest.raises(InputError, match=rf"clips of {frames} x .*{nearest} x {height} x {width}; change"):
        codec.encode(torch.zeros(1, 3, frames, height, width))
    with pytest.raises(InputError, match=r"the nearest are 9? ?"):
        codec.latent_shape(codec.num_pixel_frames(3), height + 1, width)


@pytest.mark.parametrize("rule", [FrameRule(4), FrameRule(6), FrameRule(8), FrameRule(4, batch=8)])
def test_numbers_of_frames_that_fit_are_those_of_their_latents(rule: FrameRule) -> None:
    fitting = [frames for frames in range(1, 100) if rule.fitting(frames) == [frames]]
    assert all(rule.pixel_frames(rule.latent_frames(frames)) == frames for frames in fitting)
    for frames in range(1, 90):
        below, above = rule.fitting(frames)[0], rule.fitting(frames)[-1]
        assert below <= frames <= above
        assert {below, above} <= {0, *fitting}


@each_clip_vae
def test_a_clip_depends_on_no_other(folder: Path, name: str) -> None:
    codec = open_tiny(folder, name, store="moments")
    clips = random_media(name, batch=3)
    together = codec.encode(clips)
    latents = together.chunk(2, dim=1)[0]
    decoded = codec.decode(latents)
    for number in (2, 0, 1):
        assert torch.equal(codec.encode(clips[number, None])[0], together[number])
        assert torch.equal(codec.decode(latents[number, None])[0], decoded[number])


@each_vae
def test_latents_of_another_network_are_refused(folder: Path, name: str) -> None:
    codec = open_tiny(folder, name)
    shape = codec.latent_shape(*SIZES[name])
    with pytest.raises(InputError, match=rf"decodes latents of {shape[0]} channels, and these have {shape[0] + 1}"):
        codec.decode(torch.zeros(1, shape[0] + 1, *shape[1:]))
    if not isinstance(codec, ClipVae):
        with pytest.raises(InputError, match=r"decodes pictures \(b, c, h, w\), and these latents"):
            codec.decode(torch.zeros(1, shape[0], 3, *shape[1:]))


# Classes whose network of these tests has tiles that meet, and pictures of more than one.
_TILES = {
    "flux2": (96, 64), "qwen_image": (288, 32), "dc_32": (544, 64), "cogvideox": (1, 48, 72), "wan21": (1, 288, 32),
    "wan22": (1, 576, 32), "hunyuan_video": (1, 288, 32), "hunyuan_video_15": (1, 288, 32), "ltx": (1, 544, 64),
    "mochi": (1, 288, 32),
}  # fmt: skip


@pytest.mark.parametrize("name", _TILES)
def test_tiles_give_whole_pictures_back(folder: Path, name: str) -> None:
    codec, whole = (open_tiny(folder, name, tiling=tiling) for tiling in (True, False))
    assert codec.identity() == whole.identity()
    media = torch.rand(1, 3, *_TILES[name], generator=torch.Generator().manual_seed(0))
    noise = torch.zeros(1, *codec.latent_shape(*_TILES[name]))
    stored = codec.encode(media, noise)
    assert stored.shape == whole.encode(media, noise).shape
    assert not stored.equal(whole.encode(media, noise)), "these are no tiles"
    assert codec.decode(stored[:, : noise.shape[1]]).shape == media.shape


@pytest.mark.parametrize("name", ["tiny", "rae"])
def test_tiles_that_do_not_meet_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"codec\.tiling: an Autoencoder\w+ has no tiles that meet"):
        open_tiny(folder, name, tiling=True)


@torch.no_grad()
def test_tiles_in_time_are_off_unless_the_recipe_asks_for_tiles(folder: Path) -> None:
    """A fresh AutoencoderKLHunyuanVideo cuts clips of more than 16 frames into overlapping pieces by itself."""
    clip = torch.rand(1, 3, 33, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.zeros(1, 4, 9, 2, 2)
    whole, tiled = (open_tiny(folder, "hunyuan_video", tiling=tiling) for tiling in (False, True))
    vae = make_tiny_vae("hunyuan_video")
    by_itself = vae.encode(2 * clip - 1).latent_dist.mean
    torch.testing.assert_close(tiled.encode(clip, noise), by_itself)
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    plain_ = vae.encode(2 * clip - 1).latent_dist.mean
    torch.testing.assert_close(whole.encode(clip, noise), plain_, rtol=1e-4, atol=1e-5)
    assert (plain_ - by_itself).abs().max() > 1e-3
    assert whole.decode(plain_).shape == tiled.decode(plain_).shape == clip.shape


def test_a_decoder_that_injects_noise_draws_the_same_and_leaves_other_draws_alone(folder: Path) -> None:
    codec = open_tiny(folder, "ltx_with_time")
    latents = torch.randn(1, 8, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = codec.decode(latents)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(codec.decode(latents), first)
    torch.manual_seed(8)
    with torch.no_grad():
        other = (make_tiny_vae("ltx_with_time").decode(latents, torch.zeros(1)).sample + 1) / 2
    assert not torch.equal(other.clamp(0, 1), first), "this network injects no noise"


def test_cogvideox_scales_as_its_pipelines_decode_also_where_they_invert_for_pictures(tmp_path: Path) -> None:
    """invert_scale_latents concerns the picture beside the latents alone: `decode_latents` is the same in all."""
    from diffusers import CogVideoXImageToVideoPipeline  # noqa: PLC0415

    save_tiny_vae(tmp_path, "cogvideox", invert_scale_latents=True)
    codec: Any = build_codec(VaeCodecConfig(name="vae", path=str(tmp_path)))
    seen = torch.randn(1, 4, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    pipeline = SimpleNamespace(vae=codec.vae, vae_scaling_factor_image=codec.vae.config.scaling_factor)
    with torch.no_grad():
        theirs = CogVideoXImageToVideoPipeline.decode_latents(pipeline, seen.transpose(1, 2))
    ours = codec.decode(seen / codec.scaling_factor + codec.shift)
    torch.testing.assert_close(ours, ((theirs + 1) / 2).clamp(0, 1))


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("wan21", {"latents_std": [1.0, 2.0]}, "the scaling factor has 2 values for 4 channels"),
        ("wan21", {"latents_std": [1.0, 2.0, 0.0, 1.0]}, "cannot load an AutoencoderKLWan"),
        ("wan21", {"temperal_downsample": [False, False, True]}, "temperal_downsample is"),
        ("wan21", {"in_channels": 4}, "pictures of other than 3 channels"),
        ("dc_32", {"scaling_factor": 0.0}, "it must be finite, and a factor positive"),
        ("flux1", {"scaling_factor": -1.0}, "it must be finite, and a factor positive"),
        ("rae", {"reshape_to_2d": False}, "reshape_to_2d is false"),
        ("ltx", {"patch_size_t": 2}, "patch_size_t is 2"),
    ],
)
def test_a_config_that_no_pipeline_could_use_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], problem: str
) -> None:
    save_tiny_vae(tmp_path, name, **changes)
    with pytest.raises(InputError, match=rf"codec\.path: cannot load an Autoencoder\w+ .*{problem}|{problem}"):
        build_codec(VaeCodecConfig(name="vae", path=str(tmp_path)))


def test_a_config_that_lies_of_its_compression_is_found_at_the_first_picture(tmp_path: Path) -> None:
    save_tiny_vae(tmp_path, "ltx", spatial_compression_ratio=16)
    codec: Any = build_codec(VaeCodecConfig(name="vae", path=str(tmp_path)))
    with pytest.raises(InputError, match=r"gives latents of shape \(8, 3, 1, 2\), and by its config\.json"):
        codec.encode(random_media("ltx", batch=1), torch.zeros(1, 8, 3, 2, 4))
