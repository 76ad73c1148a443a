"""Text encoders of every family that pipelines use, with small random weights and tokenizers that are learnt here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

_SENTENCES = [
    f"a {size} {colour} {animal} {verb} over the {place}. describe the image: 1. the main content.\n"
    for size in ("big", "small", "very old")
    for colour in ("red", "green", "yellow")
    for animal in ("dog", "cat", "horse")
    for verb in ("jumps", "flies")
    for place in ("hill", "river", "lazy fox")
]

_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
_LANGUAGE_MODEL = {**_TOWER, "num_key_value_heads": 1, "head_dim": 8}

_CHAT = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def _save(network_class: Any, config: Any, folder: Path, seed: int) -> Path:
    """Write a network whose weights, norms included, depend on the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = network_class(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    return folder


def save_umt5(folder: Path, seed: int) -> Path:
    """A UMT5EncoderModel of 128 tokens, without a tokenizer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.UMT5Config(vocab_size=128, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    return _save(transformers.UMT5EncoderModel, config, folder, seed)


def save_clip_text(folder: Path, seed: int, *, projected: bool, width: int = 16, end: bool = True) -> Path:
    """A CLIP text tower for 77 tokens. Without `end` its config has the end token 2, as that of Stable Diffusion."""
    transformers = pytest.importorskip("transformers")
    vocabulary = clip_vocabulary()
    config = transformers.CLIPTextConfig(
        **_TOWER | {"hidden_size": width},
        vocab_size=len(vocabulary),
        projection_dim=12,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1 if end else 2,
    )
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return _save(getattr(transformers, name), config, folder, seed)


def clip_vocabulary() -> dict[str, int]:
    byte_level = sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    tokens = [*byte_level, *(f"{byte}</w>" for byte in byte_level), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


def save_clip_tokenizer(folder: Path, *, pad: str = "<|endoftext|>") -> Path:
    """The tokenizer of `save_clip_text`: bytes without merges."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer(vocab=clip_vocabulary(), merges=[], model_max_length=77, pad_token=pad)
    tokenizer.save_pretrained(folder)
    return folder


def save_t5gemma(folder: Path, seed: int) -> Path:
    """The encoder of a T5-Gemma, as PRX has it, with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder  # noqa: PLC0415  it takes seconds

    whole = transformers.T5GemmaConfig(encoder=_LANGUAGE_MODEL | {"vocab_size": 400}, decoder=_LANGUAGE_MODEL)
    _save(T5GemmaEncoder, whole.encoder, folder, seed)
    return save_gemma_tokenizer(folder, max_length=40)


def save_gemma(folder: Path, seed: int, number: int = 2) -> Path:
    """A Gemma 2 or 3 with its tokenizer. Its window is shorter than some captions."""
    transformers = pytest.importorskip("transformers")
    name = {2: "Gemma2", 3: "Gemma3Text"}[number]
    config = getattr(transformers, f"{name}Config")(**_LANGUAGE_MODEL, vocab_size=400, sliding_window=16)
    _save(getattr(transformers, f"{name}Model"), config, folder, seed)
    return save_gemma_tokenizer(folder)


def save_gemma_tokenizer(folder: Path, max_length: int = 2048) -> Path:
    """Merges over words that begin with a low line, and bytes for the rest."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=380, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    backend.train_from_iterator(_SENTENCES, trainer)
    model = _model_of(backend)
    tokenizer = transformers.GemmaTokenizer(vocab=model["vocab"], merges=model["merges"], model_max_length=max_length)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder


def save_qwen3(folder: Path, seed: int, blocks: int = 4, scale: float = 1.0) -> Path:
    """A Qwen3ForCausalLM with its tokenizer and chat template; `scale` multiplies the word embeddings."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(**_LANGUAGE_MODEL | {"num_hidden_layers": blocks}, vocab_size=400)
    _save(transformers.Qwen3ForCausalLM, config, folder, seed)
    if scale != 1.0:
        network = transformers.Qwen3ForCausalLM.from_pretrained(folder)
        network.model.embed_tokens.weight.data.mul_(scale)
        network.save_pretrained(folder)
    return save_byte_tokenizer(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def save_qwen_vl(folder: Path, seed: int) -> Path:
    """A whole Qwen2_5_VLForConditionalGeneration with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    text = _TOWER | {"num_key_value_heads": 1, "vocab_size": 400}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision | {"fullatt_block_indexes": [0]}, image_token_id=399, video_token_id=398
    )
    _save(transformers.Qwen2_5_VLForConditionalGeneration, config, folder, seed)
    return save_byte_tokenizer(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def save_llama(folder: Path, seed: int) -> Path:
    """A LlamaModel with the tokenizer of Llama 3: bytes, merges, and a token before every text."""
    transformers = pytest.importorskip("transformers")
    _save(transformers.LlamaModel, transformers.LlamaConfig(**_LANGUAGE_MODEL, vocab_size=400), folder, seed)
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    return save_byte_tokenizer(folder, [f"<|{name}|>" for name in names], begin="<|begin_of_text|>")


def save_mistral3(folder: Path, seed: int, blocks: int = 4) -> Path:
    """A whole Mistral3ForConditionalGeneration with a tokenizer and a chat template like Mistral's; padding is left."""
    transformers = pytest.importorskip("transformers")
    text = {**_LANGUAGE_MODEL, "num_hidden_layers": blocks, "vocab_size": 400, "model_type": "mistral"}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 8}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=399)
    _save(transformers.Mistral3ForConditionalGeneration, config, folder, seed)
    special = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    save_byte_tokenizer(folder, special, begin="<s>")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = "<pad>", "left"
    tokenizer.chat_template = (
        "{{- bos_token }}{%- for message in messages %}"
        "{%- set name = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}"
        "{{- '[' + name + ']' + message.content[0].text + '[/' + name + ']' }}"
        "{%- endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def save_byte_tokenizer(folder: Path, special: Sequence[str], begin: str | None = None) -> Path:
    """Merges over bytes, cut at words and lines, with the chat template of Qwen."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(_SENTENCES, trainer)
    backend.add_special_tokens(list(special))
    backend.add_tokens(["<think>", "</think>"])
    if begin is not None:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=special[0], bos_token=begin, padding_side="right", chat_template=_CHAT
    )
    tokenizer.save_pretrained(folder)
    return folder


def _model_of(backend: Any) -> dict[str, Any]:
    model = json.loads(backend.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}
