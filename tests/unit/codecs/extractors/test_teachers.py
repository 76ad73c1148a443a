"""Teachers, whose maps are those of their modules called by hand, and the grid that their features are stored on."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pomscale.base.errors import InputError
from pomscale.codecs.extractors import FeatureEncoder, build_extractor, build_feature_encoder
from pomscale.codecs.extractors.digits import Digits
from pomscale.codecs.extractors.teachers import grid_of_tokens, middle_frames, resized_map
from pomscale.config.codecs import FeaturesConfig
from support.tiny_models import save_dinov2


def pictures(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def build(teacher: str, size: tuple[int, int], **settings: object) -> FeatureEncoder:
    return build_feature_encoder(FeaturesConfig.model_validate({"teacher": teacher, **settings}), size)


class Patches(nn.Module):
    """Means of 8x8 pixels, with a channel more: a map, its tokens, or tokens with one too many."""

    def __init__(self, kind: str, channels: int = 3) -> None:
        super().__init__()
        self.kind = kind
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.channels:
            raise RuntimeError("wrong number of channels")
        means = nn.functional.avg_pool2d(x.float(), 8)
        means = torch.cat([means, means.sum(1, keepdim=True)], 1)
        if self.kind == "map":
            return means
        tokens = means.flatten(2).transpose(1, 2)
        return tokens if self.kind == "tokens" else torch.cat([tokens[:, :1], tokens], 1)


def script(folder: Path, kind: str, channels: int = 3) -> str:
    torch.jit.script(Patches(kind, channels)).save(str(folder / f"{kind}.pt"))
    return f"torchscript:{folder / kind}.pt"


@pytest.mark.parametrize(("registers", "input_size"), [(0, None), (3, None), (0, 98)])
def test_dinov2_gives_the_patch_tokens_after_the_last_normalisation(
    tmp_path: Path, registers: int, input_size: int | None
) -> None:
    transformers = pytest.importorskip("transformers")
    side = input_size or 224
    spec = f"dinov2:{save_dinov2(tmp_path, 0, image_size=side, registers=registers)}"
    media = pictures(2, 3, 40, 60)
    encoder = build(spec, (40, 60), input_size=input_size)
    found = encoder.encode(media)
    network = transformers.AutoModel.from_pretrained(tmp_path).eval()
    mean, std = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for picture, features in zip(media, found, strict=True):
        resized = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
        values = (torch.from_numpy(np.asarray(resized) / 255.0).permute(2, 0, 1).float() - mean) / std
        with torch.no_grad():
            expected = network(values[None], output_hidden_states=True)
            normalised = network.layernorm(expected.hidden_states[-1])[0, 1 + registers :]
        torch.testing.assert_close(features, normalised, rtol=1e-4, atol=1e-4)
    assert encoder.grid(40, 60) == (side // 14, side // 14)
    assert found.shape == (2, (side // 14) ** 2, encoder.dim(40, 60))


def test_a_network_is_one_as_extractor_and_as_teacher(tmp_path: Path) -> None:
    """Loading, preprocessing and identity are shared; the input size is part of the identity."""
    pytest.importorskip("transformers")
    spec = f"dinov2:{save_dinov2(tmp_path, 0)}"
    teacher = build(spec, (8, 8)).teacher
    assert teacher.identity == build_extractor(spec).identity
    assert teacher.identity != build(spec, (8, 8), input_size=28).teacher.identity
    assert build("digits", (8, 8)).teacher.identity == build_extractor("digits").identity


def test_digits_gives_its_map_before_pooling() -> None:
    media = pictures(3, 1, 8, 8)
    encoder = build("digits", (8, 8))
    found = encoder.encode(media)
    assert encoder.grid(8, 8) == (4, 4)
    assert found.shape == (3, 16, 64)
    torch.testing.assert_close(found.mean(1), Digits().extract(media)["pooled"])
    by_hand = Digits()._network.map(media / 255.0)
    torch.testing.assert_close(found[1, 6], by_hand[1, :, 1, 2], rtol=0, atol=0)


def test_a_traced_module_is_called_as_a_scripted_one(tmp_path: Path) -> None:
    media = pictures(3, 3, 16, 24)
    torch.jit.trace(Patches("map"), media).save(str(tmp_path / "traced.pt"))
    encoder = build(f"torchscript:{tmp_path / 'traced.pt'}", (16, 24))
    torch.testing.assert_close(encoder.encode(media), Patches("tokens")(media), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["map", "tokens"])
def test_a_torchscript_module_gives_a_map_or_tokens(tmp_path: Path, kind: str, channels: int) -> None:
    encoder = build(script(tmp_path, kind, channels), (16, 40))
    media = pictures(2, channels, 16, 40)
    assert encoder.teacher.num_channels == channels
    assert encoder.grid(16, 40) == (2, 5)
    expected = Patches("tokens", channels)(media)
    torch.testing.assert_close(encoder.encode(media), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("digits:x", {}, r"features\.teacher digits:x: digits takes no file"),
        ("clip:x", {}, r"features\.teacher clip:x: there is no 'clip'; choose from dinov2:FOLDER"),
        ("dinov2:nowhere", {}, r"nowhere is no folder here.*hf download"),
        ("torchscript:nowhere.pt", {}, r"nowhere\.pt is no file here"),
        ("digits", {"input_size": 28}, r"features\.input_size: is for dinov2"),
        ("digits", {}, r"takes pictures of 8x8"),
    ],
)
def test_wrong_teachers_are_refused_in_one_line(spec: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(spec, (16, 16), **settings).grid(16, 16)


def test_a_module_with_other_tokens_than_patches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"its 5 tokens fill no grid of square patches of 16x16 pixels"):
        build(script(tmp_path, "class"), (16, 16))


def test_an_input_size_without_whole_patches_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="100 pixels are no multiple of the patches of 14"):
        build(f"dinov2:{save_dinov2(tmp_path, 0)}", (8, 8), input_size=100)


@pytest.mark.parametrize(("before", "after"), [(16, 16), (16, 8), (16, 5), (7, 3), (4, 9), (5, 1)])
def test_a_map_is_resized_axis_by_axis(before: int, after: int) -> None:
    """Shorter: the exact mean over the area; longer: linear between the centres of cells."""
    values = torch.randn(2, 3, before, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2, 3, after, 6, dtype=torch.float64)
    for i in range(after):
        for j in range(before):
            if after <= before:
                begin, end = Fraction(i * before, after), Fraction((i + 1) * before, after)
                weight = max(Fraction(0), min(end, Fraction(j + 1)) - max(begin, Fraction(j))) * after / before
            else:
                position = max(Fraction(2 * i + 1, 2) * before / after - Fraction(1, 2), Fraction(0))
                weight = max(Fraction(0), 1 - abs(min(position, Fraction(before - 1)) - j))
            expected[:, :, i] += float(weight) * values[:, :, j]
    torch.testing.assert_close(resized_map(values, (after, 6)), expected, rtol=0, atol=1e-12)
    turned = resized_map(values.transpose(2, 3), (6, after)).transpose(2, 3)
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-12)


def test_a_clip_has_the_features_of_one_frame_per_group(tmp_path: Path) -> None:
    encoder = build(script(tmp_path, "map"), (16, 24), grid=[3, 1, 3])
    media = pictures(2, 3, 9, 16, 24)
    found = encoder.encode(media)
    assert middle_frames(9, 3) == [1, 4, 7]
    assert middle_frames(80, 20) == list(range(2, 80, 4))
    assert middle_frames(17, 5) == [0, 3, 7, 11, 15]  # causal: the first frame alone, then fours
    assert middle_frames(3, 3) == [0, 1, 2]
    assert encoder.grid(9, 16, 24) == (3, 1, 3)
    maps = torch.stack([Patches("map")(media[:, :, frame]) for frame in (1, 4, 7)], 2)
    torch.testing.assert_close(found, maps.mean(3, keepdim=True).flatten(2).transpose(1, 2))
    with pytest.raises(InputError, match=r"features\.grid: 2 frames make neither 3 equal groups"):
        encoder.grid(2, 16, 24)


@pytest.mark.parametrize(
    ("num_tokens", "size", "grid"),
    [(256, (256, 256), (16, 16)), (360, (240, 384), (15, 24)), (257, (256, 256), None), (6, (16, 24), (2, 3))],
)
def test_the_grid_of_square_patches(num_tokens: int, size: tuple[int, int], grid: tuple[int, int] | None) -> None:
    assert grid_of_tokens(num_tokens, *size) == grid
