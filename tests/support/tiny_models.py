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


def save_video_vae(folder: Path, seed: int, **changes: Any) -> Path:
    """An AutoencoderKLCogVideoX: 4x downsampling in time as in space, 4 channels. Tiles of 24x40 pixels if enabled.

    `changes` are arguments of the network's constructor.
    """
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        arguments = {
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
        vae = diffusers.AutoencoderKLCogVideoX(**arguments | changes)
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
