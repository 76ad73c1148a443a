"""Prompts, turned into the text conditions of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from pomscale.base.condition import Text
from pomscale.base.console import warn
from pomscale.codecs.base import TextEncoder


def embed_prompts(encoder: TextEncoder, prompts: Sequence[str]) -> Text:
    """Encode prompts as training has its captions: (n max_length dim) float16, padded, on the CPU.

    Only the beginning of a prompt with more tokens than max_length is used, and a warning says how much that is.
    """
    longest = encoder.config.max_length
    distinct = list(dict.fromkeys(prompts))
    for prompt, num_tokens in zip(distinct, encoder.num_tokens(distinct), strict=True):
        if num_tokens > longest:
            warn(
                f"prompt {abbreviated(prompt)}: {num_tokens} tokens, and the text encoder was used with at most "
                f"{longest}: the last {num_tokens - longest} are left out"
            )
    embeddings = dict(zip(distinct, encoder.encode(distinct), strict=True))
    rows = [torch.from_numpy(embeddings[prompt]).half() for prompt in prompts]
    return Text(
        torch.stack([pad(row, (0, 0, 0, longest - len(row))) for row in rows]),
        torch.stack([torch.arange(longest) < len(row) for row in rows]),
    )


def abbreviated(prompt: str) -> str:
    """Return the first 60 characters of a prompt, in quotes."""
    return repr(prompt if len(prompt) <= 60 else f"{prompt[:57]}...")
