"""The networks that `pomscale bench codecs` measures, of the sizes that people use, and what they are fed with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pomscale.media.mp4 import open_mp4

FPS = 16
NUM_FILES = 16
NUM_CAPTIONS = 64

_KL: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


@dataclass(frozen=True)
class Autoencoder:
    """An autoencoder of diffusers, as its constructor builds it with `arguments`.

    Attributes:
        class_name: Class of diffusers.
        arguments: Arguments of its constructor; those left out are the class's own.
        frames: 1 + k times this many frames come back; None = it takes pictures.
        unit_pixels: Whether it takes pixels in [0, 1], and not in [-1, 1].
        is_of_frames: Whether it takes pictures as clips of one frame.
        side: The only height and width that it takes, in pixels; None = any multiple of its factor.
    """

    class_name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    frames: int | None = None
    unit_pixels: bool = False
    is_of_frames: bool = False
    side: int | None = None


AUTOENCODERS: dict[str, Autoencoder] = {
    "sd": Autoencoder("AutoencoderKL", _KL | {"latent_channels": 4}),
    "flux.1": Autoencoder(
        "AutoencoderKL", _KL | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    ),
    "flux.2": Autoencoder("AutoencoderKLFlux2"),
    "qwen-image": Autoencoder("AutoencoderKLQwenImage", is_of_frames=True),
    "dc-ae": Autoencoder("AutoencoderDC"),
    "taesd": Autoencoder("AutoencoderTiny"),
    "rae": Autoencoder("AutoencoderRAE", unit_pixels=True, side=256),
    "cogvideox": Autoencoder("AutoencoderKLCogVideoX", frames=8),
    "wan-2.1": Autoencoder("AutoencoderKLWan", frames=4),
    "wan-2.2": Autoencoder(
        "AutoencoderKLWan",
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
        },
        frames=4,
    ),
    "hunyuan-video": Autoencoder("AutoencoderKLHunyuanVideo", frames=4),
    "hunyuan-video-1.5": Autoencoder("AutoencoderKLHunyuanVideo15", frames=4),
    "ltx-video": Autoencoder("AutoencoderKLLTXVideo", frames=8),
    "mochi": Autoencoder("AutoencoderKLMochi", frames=6),
}


@dataclass(frozen=True)
class TextTower:
    """A text encoder of transformers: class, class of its config, and the config's fields.

    max_length: tokens of a caption, all of which the captions of the benchmark have.
    """

    class_name: str
    config_name: str
    fields: Mapping[str, Any]
    max_length: int = 256


_T5 = {"d_kv": 64, "feed_forward_proj": "gated-gelu", "num_layers": 24}
_XXL = _T5 | {"d_model": 4096, "d_ff": 10240, "num_heads": 64}

TEXT_TOWERS: dict[str, TextTower] = {
    "clip-l": TextTower(
        "CLIPTextModel",
        "CLIPTextConfig",
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        max_length=77,
    ),
    "clip-g": TextTower(
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
            "hidden_act": "gelu",
        },
        max_length=77,
    ),
    "t5-v1.1-large": TextTower(
        "T5EncoderModel", "T5Config", _T5 | {"vocab_size": 32128, "d_model": 1024, "d_ff": 2816, "num_heads": 16}
    ),
    "t5-v1.1-xxl": TextTower("T5EncoderModel", "T5Config", _XXL | {"vocab_size": 32128}),
    "umt5-xxl": TextTower("UMT5EncoderModel", "UMT5Config", _XXL | {"vocab_size": 256384}),
    "gemma-2-2b": TextTower(
        "Gemma2Model",
        "Gemma2Config",
        {
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
        },
    ),
    "qwen3-0.6b": TextTower(
        "Qwen3Model",
        "Qwen3Config",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "qwen3-4b": TextTower(
        "Qwen3Model",
        "Qwen3Config",
        {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
}


def build_autoencoder(autoencoder: Autoencoder) -> Any:
    """Build the network on the default device, with random weights."""
    import diffusers  # noqa: PLC0415  optional, and seconds to import

    torch.manual_seed(0)
    return getattr(diffusers, autoencoder.class_name)(**autoencoder.arguments).eval().requires_grad_(False)


def build_text_tower(tower: TextTower) -> Any:
    """Build the network on the default device, with random weights."""
    import transformers  # noqa: PLC0415  optional, and seconds to import

    torch.manual_seed(0)
    config = getattr(transformers, tower.config_name)(**tower.fields)
    return getattr(transformers, tower.class_name)(config).eval().requires_grad_(False)


def save_tokenizer(folder: Path) -> Any:
    """Save and return a tokenizer that has a token for each byte, so that the length of a caption is known."""
    import tokenizers  # noqa: PLC0415  as above
    import transformers  # noqa: PLC0415

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<pad>", "</s>"])
    end = [("</s>", backend.token_to_id("</s>"))]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", padding_side="right"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def captions(num_tokens: int) -> list[str]:
    """Return captions of so many tokens of `save_tokenizer`, the end token included."""
    letters = "a big red dog runs over the green hill at noon "
    return [(letters[n % len(letters) :] + letters * num_tokens)[: num_tokens - 1] for n in range(NUM_CAPTIONS)]


def write_pictures(folder: Path) -> None:
    """Write JPEGs of 500x375, ImageNet's usual size: smooth noise, which compresses as photographs do."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(NUM_FILES):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)


def write_clips(folder: Path, num_frames: int) -> None:
    """Write mp4 files of 640x400: smooth noise that moves."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(NUM_FILES):
        coarse = Image.fromarray(rng.integers(0, 256, (25, 40, 3), dtype=np.uint8))
        still = np.asarray(coarse.resize((640, 400), Image.Resampling.BICUBIC))
        with open_mp4(folder / f"{number:06d}.mp4", FPS) as stream:
            stream.write(np.stack([np.roll(still, 4 * frame, axis=1) for frame in range(num_frames)]))
