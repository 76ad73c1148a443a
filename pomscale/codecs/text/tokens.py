"""Captions to tokens: the tokenizer beside a network, templates, and what is cut off or added."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers.models import Unigram
from transformers import AutoTokenizer, ByT5Tokenizer
from transformers.utils import cached_file

from pomscale.base.errors import InputError
from pomscale.codecs.text.network import LOAD_ERRORS
from pomscale.config.text import CAPTION, CHATS, Side, TextEncoderConfig

# Without one of these, transformers makes up a tokenizer that knows no words.
_VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")


# A caption without special tokens.
_PROBE = "a photo of 2 dogs"


class CaptionTokenizer:
    """Turns captions into tokens by a resolved section: cleaned, put into the template, and cut to its length."""

    def __init__(self, config: TextEncoderConfig, num_embeddings: int) -> None:
        """Load the tokenizer that belongs to a network of so many tokens.

        Raises InputError if there is none or it is of another network, or if the template does not fit it.
        """
        assert config.max_length is not None
        self._tokenizer = _load(config, num_embeddings)
        self._clean = config.clean
        self.vocabulary = sorted(self._tokenizer.get_vocab().items())
        self.template = self._rendered(config)
        pieces = self._split_template(self.template or CAPTION)
        probe = self._probe() if len(pieces) > 1 else []
        _read_special_tokens_as_text(self._tokenizer)
        self._front, self._back = self._added()
        place = next(i for i, piece in enumerate(pieces) if isinstance(piece, str) and CAPTION in piece)
        self._before, self._after = self._tokens_of(pieces[:place]), self._tokens_of(pieces[place + 1 :])
        self._slot = str(pieces[place])
        """The text around the caption up to the next special tokens: its tokens are made anew for every caption."""
        if self._front and self._before[: len(self._front)] == self._front:  # the template has it, as chats do
            self._front = []
        if probe and probe != self._content([_PROBE])[0]:
            raise InputError(
                f"text.template: the tokenizer in {config.path!r} reads it differently beside a caption; give a "
                f"template without special tokens"
            )
        self.dropped = self._dropped(config)
        self.limit = config.max_length + len(self.dropped)
        self.pad = self._tokenizer.pad_token_id
        """The token of padding; None where there is none."""
        self.padding_side: Side = config.padding_side or self._tokenizer.padding_side
        self._check_room(config)

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each caption, at most `limit`; those of `dropped` are among them."""
        room = self.limit - len(self._front) - len(self._back)
        return [[*self._front, *content[:room], *self._back] for content in self._content(captions)]

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return the number of tokens of each whole caption without those that are dropped."""
        return [len(ids) - len(self.dropped) for ids in self._whole(captions)]

    def _cleaned(self, caption: str) -> str:
        if self._clean in ("html", "spaces"):
            text = html.unescape(html.unescape(caption)).strip()
            return re.sub(r"\s+", " ", text) if self._clean == "spaces" else text
        return caption.lower().strip() if self._clean == "lower" else caption

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self._tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids)

    def _tokens_of(self, pieces: Sequence[str | int]) -> list[int]:
        of_pieces = ([piece] if isinstance(piece, int) else self._plain([piece])[0] for piece in pieces)
        return [id_ for ids in of_pieces for id_ in ids]

    def _content(self, captions: Sequence[str]) -> list[list[int]]:
        """Return the tokens of captions in the template, without those that the tokenizer adds to every text."""
        texts = [self._slot.replace(CAPTION, self._cleaned(caption), 1) for caption in captions]
        return [[*self._before, *ids, *self._after] for ids in self._plain(texts)]

    def _whole(self, captions: Sequence[str]) -> list[list[int]]:
        return [[*self._front, *content, *self._back] for content in self._content(captions)]

    def _rendered(self, config: TextEncoderConfig) -> str:
        """Return the template with the mark of the caption, or '' for the caption alone."""
        assert config.template is not None
        if config.template not in CHATS:
            return config.template
        chat = CHATS[config.template]
        try:
            template = self._tokenizer.apply_chat_template(chat.messages(), tokenize=False, **chat.arguments)
        except LOAD_ERRORS as error:
            raise InputError(
                f"text.template: {config.template}, but the tokenizer in {config.path!r} has no chat template: {error}"
            ) from error
        if template.count(CAPTION) != 1:
            raise InputError(
                f"text.template: the chat template of {config.path!r} does not hold the caption once; write it as a "
                f"text with {CAPTION}"
            )
        return str(template)

    def _split_template(self, template: str) -> list[str | int]:
        """Return the template in pieces: special tokens as numbers, and the texts between them.

        A tokenizer splits texts at them, too, so that the pieces have the tokens of the whole; but special tokens that
        a caption names stay text.
        """
        added = self._tokenizer.added_tokens_decoder
        special: dict[str, str | int] = {token.content: id_ for id_, token in added.items() if token.special}
        longest_first = sorted(special, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", template) if special else [template]
        return [special.get(part, part) for part in parts if part]

    def _probe(self) -> list[int]:
        """Return the tokens of the template with a caption, by the tokenizer as it is."""
        return self._plain([self.template.replace(CAPTION, _PROBE, 1)])[0]

    def _added(self) -> tuple[list[int], list[int]]:
        """Return the tokens that the tokenizer puts before and behind any text."""
        with_all, plain = list(self._tokenizer("a").input_ids), self._plain(["a"])[0]
        begin = next((i for i in range(len(with_all) + 1) if with_all[i : i + len(plain)] == plain), len(with_all))
        return with_all[:begin], with_all[begin + len(plain) :]

    def _dropped(self, config: TextEncoderConfig) -> range:
        """Return the positions of the tokens that are dropped."""
        prefix, _, _ = self.template.partition(CAPTION)
        before = len(self._front) + len(self._tokens_of(self._split_template(prefix)))
        if config.drop_tokens == "prefix":  # pipeline_sana keeps the first, and the last before the caption
            return range(1, max(1, before + len(self._back) - 1)) if prefix else range(0)
        assert config.drop_tokens is not None
        if config.drop_tokens > before:
            raise InputError(
                f"text.drop_tokens: {config.drop_tokens}, but with the tokenizer in {config.path!r} only {before} "
                f"tokens precede the caption, which would be cut; is it the tokenizer that the template was made for?"
            )
        return range(config.drop_tokens)

    def _check_room(self, config: TextEncoderConfig) -> None:
        fixed = self.num_tokens([""])[0]
        assert config.max_length is not None
        if self.template and fixed >= config.max_length:
            raise InputError(
                f"text.template: {fixed} tokens of its own are kept, and text.max_length is {config.max_length}, so "
                f"that no caption has room; raise text.max_length, or text.drop_tokens"
            )
        if config.padding != "none" and self.pad is None:
            raise InputError(
                f"text.padding: {config.padding}, but the tokenizer in {config.path!r} has no token for it; set "
                f"text.padding=none"
            )
        if config.padding == "none" and fixed < 1:
            raise InputError(
                "text.template: an empty caption has no tokens, and its embedding stands for a dropped one; give a "
                "template, or drop fewer tokens (text.drop_tokens)"
            )


def _load(config: TextEncoderConfig, num_embeddings: int) -> Any:
    tokenizer: Any
    if config.tokenizer == "bytes":
        tokenizer = ByT5Tokenizer()
        if num_embeddings != len(tokenizer):
            raise InputError(
                f"text.tokenizer: bytes are {len(tokenizer)} tokens, and the network in {config.path!r} has "
                f"{num_embeddings}; it is no ByT5, set text.tokenizer=pretrained"
            )
        return tokenizer
    folder = _folder(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, subfolder=folder)
    except LOAD_ERRORS as error:
        raise InputError(f"text.path: cannot load the tokenizer in {config.path!r}: {error}. Get it again") from error
    if len(tokenizer) > num_embeddings:
        raise InputError(
            f"text.path: the tokenizer in {config.path!r} has {len(tokenizer)} tokens, and the network "
            f"{num_embeddings}; they do not belong together"
        )
    return tokenizer


def _read_special_tokens_as_text(tokenizer: Any) -> None:
    """Make `tokenizer` take "</s>" in a caption for four characters, as sentencepiece does.

    As the end token, it would give the caption "</s>" the embedding of an empty caption, which means a dropped one.
    `split_special_tokens` alone does this for bytes and for merges (BPE). The pieces of a Unigram model include the
    special tokens; they get names that occur in no caption, and keep their ids.
    """
    tokenizer.split_special_tokens = True
    backend = getattr(tokenizer, "backend_tokenizer", None)  # ByT5 has none
    if backend is None or not isinstance(backend.model, Unigram):
        return
    state = json.loads(backend.to_str())
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    # The pre-tokenizer of sentencepiece leaves no space in what it hands to the model.
    pieces = [(f" {piece} " if piece in special else piece, score) for piece, score in state["model"]["vocab"]]
    backend.model = Unigram(pieces, state["model"]["unk_id"], state["model"]["byte_fallback"])


def _folder(config: TextEncoderConfig) -> str:
    """Return the folder of the vocabulary inside `config.path`: beside the weights, or where diffusers puts it."""
    # text_encoder -> tokenizer, text_encoder_2 -> tokenizer_2
    folders = dict.fromkeys([config.subfolder, config.subfolder.replace("text_encoder", "tokenizer"), "tokenizer"])
    for folder in folders:
        if any(_exists(config.path, folder, name) for name in _VOCABULARIES):
            return folder
    names = " or ".join(f"{config.path}/{folder}".rstrip("/") for folder in folders)
    raise InputError(
        f"text.path: no {' or '.join(_VOCABULARIES)} in {names}; put the tokenizer there, or set "
        f"text.tokenizer=bytes for a ByT5"
    )


def _exists(path: str, folder: str, name: str) -> bool:
    """Return whether a local folder or a hub id has the file."""
    try:
        cached_file(path, name, subfolder=folder)
    except OSError:
        return False
    return True
