"""Named model sizes: plain data, so that a login node can plan and validate without torch.

DiPoM sizes follow the authors' v1 code (HoMM, `src/model/network/imagediffusion.py`): degree 2, expansion 2,
feed-forward expansion 3 for S and B, 2 for L and XL. DiT sizes are the same trunk with attention and
feed-forward expansion 4 (Peebles & Xie 2023, table 1).

V-DiPoM-XL is the size of the PoM paper's text-to-video model: 20 blocks, 1152 wide, about 1.1 G parameters. Its smaller
siblings and V-DiT, the same trunk with attention, are ours. dipom-*-2-text, for pictures of a text, has these sizes: a
cross mixer in every block reads the text as in V-DiPoM.

JiT sizes are those of arXiv 2511.13720, for pixels; jit-*-pom has the mixer of the authors' code (JiTpp,
`configs/jit_b_pom_4gpu.yaml`): coefficients of degree 3, expansion 2, as many gates as attention has heads.
jit-*-16-pom-text has the tokens of a text in place of those of a class, from the same block on.
"""

from __future__ import annotations

from typing import Any

_DIPOM_SIZES: dict[str, dict[str, Any]] = {
    "s": {"dim": 384, "depth": 12, "ffn_expansion": 3},
    "b": {"dim": 768, "depth": 12, "ffn_expansion": 3},
    "l": {"dim": 1024, "depth": 24, "ffn_expansion": 2},
    "xl": {"dim": 1152, "depth": 28, "ffn_expansion": 2},
}
_DIT_SIZES: dict[str, dict[str, Any]] = {
    "s": {"dim": 384, "depth": 12, "num_heads": 6},
    "b": {"dim": 768, "depth": 12, "num_heads": 12},
    "l": {"dim": 1024, "depth": 24, "num_heads": 16},
    "xl": {"dim": 1152, "depth": 28, "num_heads": 16},
}
_VIDEO_SIZES: dict[str, dict[str, Any]] = {
    "s": {"dim": 384, "depth": 12, "num_heads": 6},
    "b": {"dim": 768, "depth": 12, "num_heads": 12},
    "l": {"dim": 1024, "depth": 16, "num_heads": 16},
    "xl": {"dim": 1152, "depth": 20, "num_heads": 16},
}
_JIT_SIZES: dict[str, dict[str, Any]] = {
    "b": {
        "dim": 768,
        "depth": 12,
        "num_heads": 12,
        "patch_embedding": {"bottleneck": 128},
        "in_context": {"tokens": 32, "start": 4},
    },
    "l": {
        "dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "patch_embedding": {"bottleneck": 128},
        "in_context": {"tokens": 32, "start": 8},
    },
    "h": {
        "dim": 1280,
        "depth": 32,
        "num_heads": 16,
        "patch_embedding": {"bottleneck": 256},
        "in_context": {"tokens": 32, "start": 10},
    },
}
_JIT: dict[str, Any] = {
    "positions": "sincos_integer",
    "time_embedding": "data_fraction",
    "norm": "rms",
    "gates": "g",
    "ffn": "swiglu",
    "ffn_expansion": 4,
}
_JIT_PATCH_SIZES = (16, 32)


def _jit_mixer(suffix: str, num_heads: int) -> dict[str, Any]:
    if suffix == "":
        return {"kind": "attention", "qk_norm": True, "rope": True}
    return {"kind": "pom", "form": "coefficients", "degree": 3, "expand": 2, "heads": num_heads, "rope": True}


_PATCH_SIZES = (2, 4, 8)

IMAGE_PRESETS: dict[str, dict[str, Any]] = {
    **{
        f"dipom-{size}-{patch}": {"mixer": "pom", "degree": 2, "expand": 2, "patch_size": patch, **fields}
        for size, fields in _DIPOM_SIZES.items()
        for patch in _PATCH_SIZES
    },
    **{
        f"dit-{size}-{patch}": {"mixer": "attention", "ffn_expansion": 4, "patch_size": patch, **fields}
        for size, fields in _DIT_SIZES.items()
        for patch in _PATCH_SIZES
    },
    **{
        f"jit-{size}-{patch}{suffix}": {
            "mixer": _jit_mixer(suffix, fields["num_heads"]),
            "patch_size": patch,
            **_JIT,
            **fields,
        }
        for size, fields in _JIT_SIZES.items()
        for patch in _JIT_PATCH_SIZES
        for suffix in ("", "-pom")
    },
    **{
        f"dipom-{size}-2-text": {"text": "cross", "mixer": "pom", "ffn_expansion": 4, "patch_size": 2, **fields}
        for size, fields in _VIDEO_SIZES.items()
    },
    **{
        f"jit-{size}-16-pom-text": {
            "mixer": _jit_mixer("-pom", fields["num_heads"]),
            "patch_size": 16,
            **_JIT,
            **fields,
            "in_context": None,
            "text": "in_context",
            "text_start": fields["in_context"]["start"],
        }
        for size, fields in _JIT_SIZES.items()
    },
}
VIDEO_PRESETS: dict[str, dict[str, Any]] = {
    f"{name}-{size}-2": {"kind": "video", "mixer": mixer, "ffn_expansion": 4, "patch_size": 2, **fields}
    for name, mixer in (("vdipom", "pom"), ("vdit", "attention"))
    for size, fields in _VIDEO_SIZES.items()
}
PRESETS: dict[str, dict[str, Any]] = {**IMAGE_PRESETS, **VIDEO_PRESETS}
