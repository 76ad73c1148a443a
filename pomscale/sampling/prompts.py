"""Prompts, turned into the text conditions of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from pomscale.base.condition import Text
from pomscale.base.console import warn
from pomscale.base.errors import InputError
from pomscale.codecs.base import TextEncoder


def embed_prompts(encoder: TextEncoder, prompts: Sequence[str]) -> Text:
    """Encode prompts as training has its captions: (n max_length dim) float16, padded, on the CPU.

    Only the beginning of a prompt with more tokens than an encoder takes is used, and a warning says how much that is.
    Raises InputError for embeddings that do not fit float16, with which no caption was stored either.
    """
    longest = encoder.max_length
    distinct = list(dict.fromkeys(prompts))
    for part in encoder.parts:
        for prompt, num_tokens in zip(distinct, part.num_tokens(distinct), strict=True):
            if num_tokens > part.max_tokens:
                warn(
                    f"prompt {abbreviated(prompt)}: {num_tokens} tokens, and the text encoder was used with at most "
                    f"{part.max_tokens}: the last {num_tokens - part.max_tokens} are left out"
                )
    embeddings = {}
    for prompt, embedding in zip(distinct, encoder.encode(distinct), strict=True):
        embeddings[prompt] = torch.from_numpy(embedding).half()
        if not torch.isfinite(embeddings[prompt]).all():
            raise InputError(f"prompt {abbreviated(prompt)}: its embedding does not fit float16; write it differently")
    rows = [embeddings[prompt] for prompt in prompts]
    return Text(
        torch.stack([pad(row, (0, 0, 0, longest - len(row))) for row in rows]),
        torch.stack([torch.arange(longest) < len(row) for row in rows]),
    )


def abbreviated(prompt: str) -> str:
    """Return the first 60 characters of a prompt, in quotes."""
    return repr(prompt if len(prompt) <= 60 else f"{prompt[:57]}...")
