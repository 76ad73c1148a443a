"""T5's encoder for captions: a thin adapter on transformers' T5EncoderModel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from pomscale.base.errors import InputError
from pomscale.codecs.loading import brief, check_fits, place
from pomscale.config.codecs import TextEncoderConfig

try:
    import transformers
    from safetensors import SafetensorError
    from tokenizers.models import Unigram
    from transformers import AutoTokenizer, ByT5Tokenizer, T5EncoderModel
    from transformers.utils import cached_file
except (ImportError, RuntimeError) as error:  # RuntimeError: it is there, but something that it imports is not
    raise InputError(f"text needs the package transformers: {error}. Run: pip install -e '.[text]'") from error

transformers.logging.disable_progress_bar()  # `pomscale` has its own

# The keys of config.json that change the arithmetic of the encoder.
_ARITHMETIC_KEYS = (
    "d_ff",
    "d_kv",
    "d_model",
    "dense_act_fn",
    "is_gated_act",
    "layer_norm_epsilon",
    "num_heads",
    "num_layers",
    "relative_attention_max_distance",
    "relative_attention_num_buckets",
    "vocab_size",
)

# Errors of transformers for folders that hold no weights or no tokenizer, or a config.json with wrong values.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    ImportError,
    SafetensorError,
)

# Without one of these, transformers makes up a tokenizer that knows no words.
_VOCABULARIES = ("tokenizer.json", "spiece.model")

# Tokens in one forward, padding included. Enough to keep an accelerator busy; short captions go many at a time.
_BATCH_TOKENS = 2048


class T5TextEncoder:
    """T5EncoderModel in evaluation mode, without gradients, with weights and arithmetic in `config.precision`.

    Embeddings fit float16: the last layer norm bounds them by sqrt(dim) times its largest weight (64 times, for XXL),
    whatever the precision.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        """Load the network. InputError if `config.path` holds none, weights that do not fit it, or no tokenizer."""
        self.config = config
        self.device = torch.device("cpu")
        self._network = _load_network(config)
        self._tokenizer = _load_tokenizer(config, self._network.config.vocab_size)
        self._vocabulary = sorted(self._tokenizer.get_vocab().items())
        _read_special_tokens_as_text(self._tokenizer)

    @property
    def dim(self) -> int:
        return int(self._network.config.d_model)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """Return (n, dim) float32 per caption, n from 1 (the end token) to max_length.

        Captions of similar length share a forward pass, whatever their order. Padding is masked, so the other captions
        of a pass change an embedding by rounding only.
        """
        tokens = [
            torch.tensor(ids)
            for ids in self._tokenizer(list(captions), truncation=True, max_length=self.config.max_length).input_ids
        ]
        embeddings: list[np.ndarray] = [np.empty(0, np.float32)] * len(tokens)
        for batch in _batches([len(ids) for ids in tokens]):
            padded = pad_sequence([tokens[index] for index in batch], batch_first=True)
            lengths = torch.tensor([len(tokens[index]) for index in batch])
            mask = torch.arange(padded.shape[1]) < lengths[:, None]
            hidden = self._network(
                input_ids=padded.to(self.device), attention_mask=mask.to(self.device)
            ).last_hidden_state
            for index, row in zip(batch, hidden.float().cpu().numpy(), strict=True):
                embeddings[index] = row[: len(tokens[index])]
        return embeddings

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        tokens = self._tokenizer(list(captions), verbose=False).input_ids  # verbose: it would warn of long captions
        return [len(ids) for ids in tokens]

    def identity(self) -> str:
        """Return the sha256 of the architecture, the vocabulary, and the weights rounded to bfloat16.

        It is the same in either precision, although the embeddings then differ by rounding.
        """
        architecture = {key: getattr(self._network.config, key) for key in _ARITHMETIC_KEYS}
        digest = hashlib.sha256(f"t5 {json.dumps(architecture, sort_keys=True)} {self.config.tokenizer}".encode())
        digest.update(json.dumps(self._vocabulary).encode())
        for name, tensor in sorted(self._network.named_parameters()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> T5TextEncoder:
        self.device = torch.device(device)
        place(self._network, self.device)
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


def _load_network(config: TextEncoderConfig) -> Any:
    folder = f"{config.path}/{config.subfolder}" if config.subfolder else config.path
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    network: Any
    loading: Any
    try:
        network, loading = T5EncoderModel.from_pretrained(  # type: ignore[misc]  # a pair, with output_loading_info
            config.path, subfolder=config.subfolder, dtype=dtype, output_loading_info=True
        )
    except _LOAD_ERRORS as error:
        raise InputError(
            f"text.path: cannot load a T5EncoderModel from {folder!r}: {brief(error)}. "
            f"Give a folder with config.json and weights, or a hub id that this machine can reach"
        ) from error
    # transformers only warns of these, and gives missing tensors random values. A whole T5 has a decoder as well.
    surplus = {name for name in loading["unexpected_keys"] if name.startswith(("encoder.", "shared."))}
    check_fits(
        "text.path",
        folder,
        {"missing": loading["missing_keys"], "mismatched": loading["mismatched_keys"], "unexpected": surplus},
    )
    return network.eval().requires_grad_(False)


def _load_tokenizer(config: TextEncoderConfig, num_embeddings: int) -> Any:
    """Load the tokenizer that belongs to a network of so many tokens."""
    tokenizer: Any
    if config.tokenizer == "bytes":
        tokenizer = ByT5Tokenizer()
        if num_embeddings != len(tokenizer):
            raise InputError(
                f"text.tokenizer: bytes are {len(tokenizer)} tokens, and the network in {config.path!r} has "
                f"{num_embeddings}; it is no ByT5, set text.tokenizer=pretrained"
            )
        return tokenizer
    folder = _tokenizer_folder(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, subfolder=folder)
    except _LOAD_ERRORS as error:
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


def _tokenizer_folder(config: TextEncoderConfig) -> str:
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
