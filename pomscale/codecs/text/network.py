"""The networks of text encoders, as transformers has them: loading, hidden states, identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pomscale.base.errors import InputError
from pomscale.codecs.loading import brief, check_fits, place
from pomscale.config.text import MODEL_TYPES, TextEncoderConfig

try:
    import transformers
    from safetensors import SafetensorError
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder
except (ImportError, RuntimeError) as error:  # RuntimeError: it is there, but something that it imports is not
    raise InputError(f"text needs the package transformers: {error}. Run: pip install -e '.[text]'") from error

transformers.logging.disable_progress_bar()  # `pomscale` has its own

LOAD_ERRORS = (
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
"""Errors of transformers for folders that hold no weights or no tokenizer, or a config.json with wrong values."""

# The keys of config.json that change the arithmetic of a T5.
_OF_T5 = (
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

# Those of the other families; a network has those that its kind knows.
_OF_OTHERS = (
    "attention_bias",
    "attn_logit_softcapping",
    "eos_token_id",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "layer_types",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "projection_dim",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "use_bidirectional_attention",
    "vocab_size",
)


@dataclass(frozen=True)
class _Family:
    """One kind of network: its class, and where its parts lie."""

    network: str | type
    """Class that loads it, of transformers."""
    text: str = ""
    """Path of the text network inside of what is loaded."""
    norm: str = "norm"
    """Path of the last norm inside of the text network."""
    prefixes: tuple[str, ...] = ("",)
    """Tensors of a folder that belong to the text network begin so; others may be left over."""
    arithmetic: tuple[str, ...] = _OF_OTHERS


# A language model's head, and the decoder of a whole T5-Gemma, are left over.
_LANGUAGE_MODEL = ("model.layers.", "layers.", "model.language_model.", "language_model.")
_T5 = partial(_Family, norm="encoder.final_layer_norm", prefixes=("encoder.", "shared."), arithmetic=_OF_T5)
_FAMILIES: dict[str, _Family] = {
    "t5": _T5("T5EncoderModel"),
    "mt5": _T5("T5EncoderModel"),
    "umt5": _T5("UMT5EncoderModel"),
    "clip_text_model": _Family("CLIPTextModel", norm="final_layer_norm", prefixes=("text_model.", "encoder.")),
    "t5_gemma_module": _Family(T5GemmaEncoder),
    "t5gemma": _Family("T5GemmaEncoderModel", "encoder", prefixes=("model.encoder.", "encoder.")),
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "qwen3", "qwen2_5_vl_text", "llama", "mistral"),
        _Family("AutoModel", prefixes=_LANGUAGE_MODEL),
    ),
    **dict.fromkeys(
        ("gemma3", "qwen2_5_vl", "mistral3"), _Family("AutoModel", "language_model", prefixes=_LANGUAGE_MODEL)
    ),
}
_PROJECTED_CLIP = _Family(
    "CLIPTextModelWithProjection", norm="text_model.final_layer_norm", prefixes=("text_model.", "text_projection.")
)


class TextNetwork:
    """A text network in evaluation mode, without gradients, with weights and arithmetic in the config's precision."""

    def __init__(self, config: TextEncoderConfig) -> None:
        """Load the network. InputError if `config.path` holds none that is known, or weights that do not fit it."""
        self._folder = f"{config.path}/{config.subfolder}" if config.subfolder else config.path
        raw = self._read_config(config)
        self.model_type = self._type_of(config, raw)
        self._is_projected = raw.get("architectures") == ["CLIPTextModelWithProjection"] or self.model_type == "clip"
        family = _PROJECTED_CLIP if self._is_projected else _FAMILIES[self.model_type]
        self._family = family
        loaded = self._load(config, family)
        self.module: nn.Module = loaded.get_submodule(family.text)
        self._norm = self.module.get_submodule(family.norm)
        self.config: Any = self.module.config
        if hasattr(self.config, "use_cache"):
            self.config.use_cache = False

    def _read_config(self, config: TextEncoderConfig) -> dict[str, Any]:
        try:
            raw, _ = transformers.PreTrainedConfig.get_config_dict(config.path, subfolder=config.subfolder)
        except LOAD_ERRORS as error:
            raise self._cannot_load(error) from error
        return dict(raw)

    def _type_of(self, config: TextEncoderConfig, raw: dict[str, Any]) -> str:
        model_type = raw.get("model_type", "t5" if config.name == "t5" else None)
        if model_type not in MODEL_TYPES:
            raise InputError(
                f"text.path: config.json in {self._folder!r} is of model_type {model_type!r}, which is no known text "
                f"encoder; known are {', '.join(MODEL_TYPES)}"
            )
        if config.name == "t5" and model_type not in ("t5", "mt5"):
            raise InputError(
                f"text.name: t5, but config.json in {self._folder!r} is of model_type {model_type!r}; set "
                f"text.name=text"
            )
        return str(model_type)

    def _load(self, config: TextEncoderConfig, family: _Family) -> nn.Module:
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        options: dict[str, Any] = {"subfolder": config.subfolder, "dtype": dtype, "output_loading_info": True}
        loader: Any = getattr(transformers, family.network) if isinstance(family.network, str) else family.network
        try:
            if self.model_type == "t5gemma":
                own = transformers.T5GemmaConfig.from_pretrained(config.path, subfolder=config.subfolder)
                own.is_encoder_decoder = False
                options["config"] = own
            network, loading = loader.from_pretrained(config.path, **options)
        except LOAD_ERRORS as error:
            raise self._cannot_load(error) from error
        # transformers only warns of these, and gives missing tensors random values. A whole T5 has a decoder as well.
        surplus = {name for name in loading["unexpected_keys"] if name.startswith(family.prefixes)}
        check_fits(
            "text.path",
            self._folder,
            {"missing": loading["missing_keys"], "mismatched": loading["mismatched_keys"], "unexpected": surplus},
        )
        assert isinstance(network, nn.Module)
        return network.eval().requires_grad_(False)

    def _cannot_load(self, error: Exception) -> InputError:
        return InputError(
            f"text.path: cannot load a text encoder from {self._folder!r}: {brief(error)}. "
            f"Give a folder with config.json and weights, or a hub id that this machine can reach"
        )

    @property
    def width(self) -> int:
        """Values of a hidden state."""
        return int(self.config.hidden_size)  # T5 has it as another name of d_model

    @property
    def num_blocks(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def num_embeddings(self) -> int:
        """Number of tokens that the network knows."""
        return int(self.config.vocab_size)

    @property
    def num_positions(self) -> int | None:
        """Longest sequence; None where positions are relative without end."""
        positions = getattr(self.config, "max_position_embeddings", None)
        return None if positions is None else int(positions)

    @property
    def pooled_width(self) -> int | None:
        """Values of the pooled vector; None where there is none."""
        if self.model_type not in ("clip", "clip_text_model"):
            return None
        return int(self.config.projection_dim) if self._is_projected else self.width

    def states(self, ids: Tensor, mask: Tensor, layers: Sequence[int], is_normed: Callable[[int], bool]) -> Tensor:
        """Return hidden states stacked on channels, (b n len(layers)*width).

        Args:
            ids: Tokens (b n).
            mask: True = the network attends to it (b n).
            layers: Numbers of hidden states, from 0 (word embeddings) to `num_blocks` (after the last block).
            is_normed: Whether the network's last norm is applied to a hidden state.
        """
        last = self.num_blocks
        if tuple(layers) == (last,) and is_normed(last):
            return self._call(ids, mask).last_hidden_state
        with self._before_norm() as before:
            found = self._call(ids, mask, output_hidden_states=True).hidden_states
        chosen = []
        for layer in layers:
            state = before[0] if layer == last else found[layer]
            chosen.append(self._norm(state) if is_normed(layer) else state)
        return torch.cat(chosen, dim=-1)

    def pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the pooled vectors of tokens (b n): (b pooled_width)."""
        found = self._call(ids, mask)
        return found.text_embeds if self._is_projected else found.pooler_output

    def _call(self, ids: Tensor, mask: Tensor, **options: Any) -> Any:
        return self.module(input_ids=ids, attention_mask=mask, **options)

    @contextmanager
    def _before_norm(self) -> Iterator[list[Tensor]]:
        """Collect what the last norm is given, which transformers keeps for few networks."""
        inputs: list[Tensor] = []
        handle = self._norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        try:
            yield inputs
        finally:
            handle.remove()

    def digest(self, kind: str, choices: str, vocabulary: object) -> str:
        """Return the sha256 (hex) of kind, architecture, choices, vocabulary, and weights rounded to bfloat16.

        It is the same in either precision, although the embeddings then differ by rounding.
        """
        keys = (key for key in self._family.arithmetic if hasattr(self.config, key))
        architecture = json.dumps({key: getattr(self.config, key) for key in keys}, sort_keys=True, default=str)
        digest = hashlib.sha256(f"{kind} {architecture} {choices}".encode())
        digest.update(json.dumps(vocabulary).encode())
        for name, tensor in sorted(self.module.named_parameters()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device) -> None:
        place(self.module, device)
