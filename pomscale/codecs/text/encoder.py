"""A text encoder of captions: tokens, network, and the choices of a convention."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from pomscale.base.errors import InputError
from pomscale.codecs.text.network import TextNetwork
from pomscale.codecs.text.tokens import CaptionTokenizer
from pomscale.config.text import TextEncoderConfig, resolved

# Tokens in one forward, padding included. Enough to keep an accelerator busy; short captions go many at a time.
_BATCH_TOKENS = 2048


class PretrainedTextEncoder:
    """A network of transformers that embeds captions as its section says, without gradients.

    `config` is complete: what the recipe leaves to the convention is filled in, and a chat template is written out.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        """Load network and tokenizer.

        Raises InputError if `config.path` holds none, weights that do not fit it, no tokenizer or another network's, or
        if the section asks for a layer, a length or a template that they do not have.
        """
        self.device = torch.device("cpu")
        self._network = TextNetwork(config)
        try:
            self._settings = resolved(config, self._network.model_type)
        except ValueError as error:
            raise InputError(str(error)) from error
        self._tokens = CaptionTokenizer(self._settings, self._network.num_embeddings)
        of_tokens = {"template": self._tokens.template, "padding_side": self._tokens.padding_side}
        self._settings = self._settings.model_copy(update=of_tokens)
        self.config = config if config.name == "t5" else self._settings
        self._layers = self._checked_layers()
        self._check_length()

    def _checked_layers(self) -> tuple[int, ...]:
        """Return the numbers of the hidden states, from 0."""
        num, chosen = self._network.num_blocks, self._settings.layers or ()
        if self._settings.output == "pooled" and self._network.pooled_width is None:
            raise InputError(
                f"text.output: a {self._network.model_type} in {self.config.path!r} has no pooled vector; take tokens"
            )
        for layer in chosen:
            if not -num - 1 <= layer <= num:
                raise InputError(
                    f"text.layers: there is no hidden state {layer}; the network in {self.config.path!r} has {num} "
                    f"blocks, so 0 to {num}, or {-num - 1} to -1"
                )
        return tuple(layer % (num + 1) for layer in chosen)

    def _check_length(self) -> None:
        longest = self._network.num_positions
        if longest is not None and self._tokens.limit > longest:
            also = f" and {len(self._tokens.dropped)} of the template" if self._tokens.dropped else ""
            raise InputError(
                f"text.max_length: {self._settings.max_length} tokens{also}, and the network in {self.config.path!r} "
                f"takes at most {longest}"
            )

    @property
    def parts(self) -> tuple[PretrainedTextEncoder, ...]:
        return (self,)

    @property
    def module(self) -> nn.Module:
        """The network of transformers."""
        return self._network.module

    @property
    def max_tokens(self) -> int:
        assert self._settings.max_length is not None
        return self._settings.max_length

    @property
    def max_length(self) -> int:
        return self._settings.stored_length

    @property
    def dim(self) -> int:
        if self._settings.output == "pooled":
            assert self._network.pooled_width is not None
            return self._network.pooled_width
        return len(self._layers) * self._network.width

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """Return (n, dim) float32 per caption: n from 1 to max_length, max_length with stored padding, 1 if pooled.

        Captions of similar length share a forward pass, whatever their order. Padding is masked, so the other captions
        of a pass change an embedding by rounding only.
        """
        tokens = self._tokens.ids(captions)
        embeddings: list[np.ndarray] = [np.empty(0, np.float32)] * len(tokens)
        is_padded = self._settings.padding != "none" and self._settings.output == "tokens"
        for batch in _batches([self._tokens.limit if is_padded else len(ids) for ids in tokens]):
            values = self._embed([tokens[index] for index in batch], is_padded)
            for index, row in zip(batch, values, strict=True):
                embeddings[index] = row
        return embeddings

    def _embed(self, tokens: Sequence[Sequence[int]], is_padded: bool) -> Iterator[np.ndarray]:
        """Yield the embeddings of some captions, from one forward pass."""
        longest = self._tokens.limit if is_padded else max(map(len, tokens))
        ids = torch.full((len(tokens), longest), self._tokens.pad or 0)
        words = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (of_row, is_word) in enumerate(zip(ids, words, strict=True)):
            length = len(tokens[row])
            begin = longest - length if is_padded and self._settings.padding_side == "left" else 0
            of_row[begin : begin + length] = torch.tensor(tokens[row])
            is_word[begin : begin + length] = True
        mask = torch.ones_like(words) if is_padded and self._settings.padding == "seen" else words
        ids, mask = ids.to(self.device), mask.to(self.device)
        if self._settings.output == "pooled":
            yield from self._network.pooled(ids, mask).float().cpu().numpy()[:, None]
            return
        states = self._network.states(ids, mask, self._layers, self._is_normed).float().cpu().numpy()
        for row, values in enumerate(states):
            kept = values if is_padded else values[: len(tokens[row])]
            dropped = self._tokens.dropped
            yield np.concatenate([kept[: dropped.start], kept[dropped.stop :]]) if dropped else kept

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        return self._tokens.num_tokens(captions)

    def identity(self) -> str:
        """Return the sha256 of the architecture, the vocabulary, the weights rounded to bfloat16, and the choices.

        It is the same in either precision, although the embeddings then differ by rounding. A T5 whose last hidden
        states are taken of captions as they are has the identity that it had before there were choices.
        """
        settings, network = self._settings, self._network
        choices: dict[str, object] = {
            "output": settings.output,
            "layers": self._layers,
            "normed": [self._is_normed(layer) for layer in self._layers],
            "template": settings.template,
            "dropped": [self._tokens.dropped.start, self._tokens.dropped.stop],
            "clean": settings.clean,
            "padding": settings.padding,
        }
        if choices == self._plain_choices() and network.model_type in ("t5", "mt5"):
            return network.digest("t5", settings.tokenizer, self._tokens.vocabulary)
        if settings.padding != "none":
            choices |= {"side": settings.padding_side, "length": self.max_tokens}
        choices |= {"model_type": network.model_type, "tokenizer": settings.tokenizer}
        return network.digest("text", json.dumps(choices, sort_keys=True), self._tokens.vocabulary)

    def _is_normed(self, layer: int) -> bool:
        final_norm = self._settings.final_norm
        return layer == self._network.num_blocks if final_norm is None else final_norm

    def _plain_choices(self) -> dict[str, object]:
        """Return the choices of an encoder that has none: the last hidden states of captions as they are."""
        return {
            "output": "tokens",
            "layers": (self._network.num_blocks,),
            "normed": [True],
            "template": "",
            "dropped": [0, 0],
            "clean": "none",
            "padding": "none",
        }

    def to(self, device: torch.device | str) -> PretrainedTextEncoder:
        self.device = torch.device(device)
        self._network.to(self.device)
        return self


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield indices in order of length, as many together as _BATCH_TOKENS allows when padded to the longest of them."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
