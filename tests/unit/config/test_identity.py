from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from pomscale.config.codecs import CodecConfig, VaeCodecConfig
from pomscale.config.identity import differences

RECIPE: dict[str, Any] = {
    "seed": 0,
    "codec": {"name": "vae", "path": "here", "store": "moments"},
    "model": {
        "kind": "image",
        "depth": 2,
        "latent_shape": [4, 8, 8],
        "mixer": {"kind": "pom", "degree": 2},
        "degree": 2,
        "expand": 2,
        "num_heads": 4,
    },
    "diffusion": {},
    "ema": {"halflives_samples": [100]},
    "data": {"normalization": "channel", "flip_probability": 0.5, "shuffle_window": 8},
    "training": {"global_batch": 8},
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 1}, ["seed: 0 then, 1 now"]),
        ({"model": {"depth": 4}}, ["model.depth: 2 then, 4 now"]),
        ({"model": {"mixer": {"kind": "pom", "degree": 3}}}, ["model.mixer.degree: 2 then, 3 now"]),
        ({"model": {"new": 1}}, ["model.new: None then, 1 now"]),
        ({"model": {"kind": "video", "depth": 4}}, ["model.kind: image then, video now"]),
        ({"model": {"degree": 3}}, []),  # the mixer has its own
        ({"model": {"mixer": "pom"}}, []),
        ({"model": {"mixer": "pom", "degree": 3}},
         ["model.mixer: {'kind': 'pom', 'degree': 2} then, pom now", "model.degree: 2 then, 3 now"]),
        ({"model": {"mixer": ["pom", {"kind": "pom", "form": "product", "expand": 2, "rope": False}]}}, []),
        ({"model": {"mixer": {"kind": "pom", "degree": 3}, "degree": 3}},
         ["model.mixer.degree: 2 then, 3 now", "model.degree: 2 then, 3 now"]),
        ({"model": {"mixer": {"kind": "pom", "degree": 2, "expand": 2}, "expand": 4, "num_heads": 8}}, []),
        ({"model": {"mixer": ["pom", "attention"]}},
         ["model.mixer: {'kind': 'pom', 'degree': 2} then, ['pom', 'attention'] now"]),
        ({"codec": {"path": "there", "subfolder": "vae"}}, []),
        ({"ema": {"halflives_samples": [200]}, "training": {"global_batch": 9}},
         ["ema.halflives_samples: [100] then, [200] now", "training.global_batch: 8 then, 9 now"]),
        ({"training": {"global_batch": None, "global_tokens": 512}},
         ["training.global_batch: 8 then, None now", "training.global_tokens: None then, 512 now"]),
    ],
)  # fmt: skip
def test_the_fields_that_differ_are_named_one_by_one(changes: dict[str, Any], expected: list[str]) -> None:
    now = {key: {**value, **changes.get(key, {})} if isinstance(value, dict) else changes.get(key, value)
           for key, value in RECIPE.items()}  # fmt: skip
    assert differences(RECIPE, now) == expected


def test_codecs_of_earlier_versions_are_the_same_codec_under_its_new_name() -> None:
    """A run that began with `sd_vae` goes on with `vae`, with `store` said or left to the class."""
    of_then = {
        **RECIPE,
        "codec": {"name": "sd_vae", "path": "a", "subfolder": "", "store": "moments", "precision": "fp32"},
    }
    for store in ("moments", None):
        now = {**RECIPE, "codec": {"name": "vae", "path": "b", "subfolder": "", "store": store, "tiling": False}}
        assert differences(of_then, now) == []
    now = {**RECIPE, "codec": {"name": "vae", "path": "b", "store": "sample"}}
    assert differences(of_then, now) == ["codec.store: moments then, sample now"]


@pytest.mark.parametrize(
    ("former", "now"),
    [
        (
            {"name": "sd_vae"},
            {"path": "stabilityai/sd-vae-ft-ema", "subfolder": "", "store": "moments", "precision": "fp32"},
        ),
        (
            {"name": "cogvideox_vae", "tiling": True},
            {"path": "THUDM/CogVideoX-5b", "subfolder": "vae", "store": "sample", "precision": "bf16", "tiling": True},
        ),
        ({"name": "sd_vae", "store": "sample"}, {"path": "stabilityai/sd-vae-ft-ema", "store": "sample"}),
        (
            {"name": "cogvideox_vae", "subfolder": ""},
            {"path": "THUDM/CogVideoX-5b", "store": "sample", "precision": "bf16"},
        ),
    ],
)
def test_sections_of_earlier_versions_keep_their_defaults(former: dict[str, Any], now: dict[str, Any]) -> None:
    read = TypeAdapter(CodecConfig).validate_python
    assert read(former) == VaeCodecConfig(name="vae", **now)
    assert read(read(former)) == read(former)
