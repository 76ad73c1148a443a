"""Prompts of the pictures or clips that a trained model draws for an evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from pomscale.base.condition import Text
from pomscale.base.errors import InputError
from pomscale.codecs.base import TextEncoder
from pomscale.sampling.prompts import embed_prompts

_NUM_KEPT = 256  # embedded prompts in memory


class DrawnPrompts:
    """Prompts by the number of a picture or clip: number i has prompt i modulo their number."""

    def __init__(self, name: str, what: str, prompts: Sequence[str], encoder: TextEncoder) -> None:
        """Take the prompts.

        Args:
            name: The model, for messages.
            what: "pictures" or "clips".
            prompts: The prompts.
            encoder: The text encoder of the model.

        Raises:
            InputError: There is no prompt.
        """
        if not prompts:
            raise InputError(
                f"{name}: say with --prompts or --prompt what the {what} are to show; the model's recipe has no "
                f"sampling.prompts"
            )
        self._prompts, self._encoder = tuple(prompts), encoder
        self._embedded = lru_cache(_NUM_KEPT)(self._embed)

    def of(self, numbers: Sequence[int]) -> list[str]:
        """Return the prompts of some pictures or clips."""
        return [self._prompts[number % len(self._prompts)] for number in numbers]

    def embedded(self, prompts: Sequence[str]) -> Text:
        """Return embedded prompts, each by itself, so that others change no digit of it."""
        texts = [self._embedded(prompt) for prompt in prompts]
        return Text(*(torch.cat(parts) for parts in zip(*texts, strict=True)))

    def settings(self) -> dict[str, Any]:
        """Return JSON that says which prompts these are."""
        digest = hashlib.sha256(json.dumps(self._prompts).encode()).hexdigest()
        return {"number": len(self._prompts), "sha256": digest}

    def _embed(self, prompt: str) -> Text:
        return embed_prompts(self._encoder, [prompt])
