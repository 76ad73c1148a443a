"""Real networks of diffusers and transformers, small enough for tests, with random weights that depend on a seed alone.

Without the package, the test is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch


def save_vae(folder: Path, seed: int) -> Path:
    """An AutoencoderKL: 2x downsampling, 4 channels."""
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


# Arguments of an AutoencoderKLCogVideoX: 4x downsampling in time as in space, 4 channels, tiles of 24x40 pixels.
VIDEO_VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("CogVideoXDownBlock3D",) * 3,
    "up_block_types": ("CogVideoXUpBlock3D",) * 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_height": 48,
    "sample_width": 80,
    "scaling_factor": 0.7,
}


def save_video_vae(folder: Path, seed: int, **changes: Any) -> Path:
    """Save the network of VIDEO_VAE; `changes` are further arguments of its constructor."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = diffusers.AutoencoderKLCogVideoX(**VIDEO_VAE | changes)
    vae.save_pretrained(folder)
    return folder


def save_t5(folder: Path, seed: int, **changes: Any) -> Path:
    """A T5EncoderModel of width 16 with the 384 tokens of ByT5, and no tokenizer, which ByT5 does without.

    `changes` are settings of its T5Config.
    """
    transformers = pytest.importorskip("transformers")
    settings = {
        "vocab_size": 384,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = transformers.T5EncoderModel(transformers.T5Config(**settings | changes))
    encoder.save_pretrained(folder)
    return folder


def save_sentencepiece(folder: Path, animals: Sequence[str] = ("dog", "cat", "horse", "bird")) -> Path:
    """The tokenizer files of a T5, with fewer than 100 tokens learnt from sentences about `animals`."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder.mkdir(parents=True, exist_ok=True)
    sentences = [f"a {size} {colour} {animal} {verb} over the {place}" for size in ("big", "small", "very old")
                 for colour in ("red", "green", "yellow") for animal in animals
                 for verb in ("jumps", "flies", "walks") for place in ("hill", "river", "lazy fox")]  # fmt: skip
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, vocab_size=100, hard_vocab_limit=False,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    return folder


def save_dinov2(folder: Path, seed: int, *, image_size: int = 28, registers: int = 0) -> Path:
    """A DINOv2 of width 16 with patches of 14, and positions for pictures of `image_size`."""
    transformers = pytest.importorskip("transformers")
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 14,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if registers:
            config = transformers.Dinov2WithRegistersConfig(**settings, num_register_tokens=registers)
            network = transformers.Dinov2WithRegistersModel(config)
        else:
            network = transformers.Dinov2Model(transformers.Dinov2Config(**settings))
        network.embeddings.position_embeddings.data.normal_()
    network.save_pretrained(folder)
    return folder


def save_clip(folder: Path, seed: int) -> Path:
    """A CLIP of width 16 for pictures of 32x32 and 12 tokens, with a tokenizer of 256 bytes and no merges."""
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    byte_level = pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet()
    tokens = [*sorted(byte_level), *(f"{byte}</w>" for byte in sorted(byte_level)), "<|startoftext|>", "<|endoftext|>"]
    start, end = len(tokens) - 2, len(tokens) - 1
    text = {"vocab_size": len(tokens), "max_position_embeddings": 12, "bos_token_id": start, "eos_token_id": end}
    tower |= {"projection_dim": 8}  # published folders have it in both towers, too
    config = transformers.CLIPConfig(
        text_config=tower | text, vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = transformers.CLIPModel(config)
    network.save_pretrained(folder)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder
