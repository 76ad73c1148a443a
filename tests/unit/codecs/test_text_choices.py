"""Choices of text encoders: layers, norms, templates, cuts, padding; what they change, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pomscale.base.errors import InputError
from pomscale.codecs import TextEncoder, build_text_encoder
from pomscale.config.text import CONVENTIONS, MODEL_TYPES, TextEncoderConfig, resolved
from support.tiny_models import save_clip, save_t5
from support.tiny_text_encoders import (
    save_byte_tokenizer,
    save_clip_text,
    save_clip_tokenizer,
    save_gemma,
    save_llama,
    save_qwen3,
    save_t5gemma,
)

transformers = pytest.importorskip("transformers")

CAPTIONS = ["a red dog", "", "a very old horse walks over the river", "naïve 馬 🐴", "a red dog"]


def text_encoder(path: Path, **fields: object) -> TextEncoder:
    settings = {"name": "text", "path": str(path), "precision": "fp32"}
    return build_text_encoder(TextEncoderConfig.model_validate(settings | fields))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("qwen"), 0)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gemma(tmp_path_factory.mktemp("gemma"), 0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip_tokenizer(save_clip_text(tmp_path_factory.mktemp("clip"), 0, projected=True))


PLAIN = {"convention": "z_image", "template": "Q: {}", "padding": "none"}


def test_layers_are_stacked_on_channels(qwen: Path) -> None:
    """Against transformers' own hidden states; the last one is before or after the norm, as `final_norm` says."""
    network = transformers.Qwen3Model.from_pretrained(qwen)
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(qwen)("Q: a red dog").input_ids])
    kept: list[torch.Tensor] = []
    handle = network.norm.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    with torch.no_grad():
        states = list(network(input_ids=ids, output_hidden_states=True).hidden_states)
        handle.remove()
        raw = [*states[:-1], kept[0]]
        normed = [network.norm(state) for state in raw]
    cases: list[tuple[list[int], bool | None, list[torch.Tensor]]] = [
        ([-1], None, [normed[4]]),
        ([4], True, [normed[4]]),
        ([-1], False, [raw[4]]),
        ([-2], None, [raw[3]]),
        ([3], True, [normed[3]]),
        ([0, 2, -1], None, [raw[0], raw[2], normed[4]]),
        ([-5, 1, 4], False, [raw[0], raw[1], raw[4]]),
    ]
    identities = set()
    for layers, final_norm, expected in cases:
        encoder = text_encoder(qwen, **PLAIN, layers=layers, final_norm=final_norm)
        assert encoder.dim == 16 * len(layers)
        (found,) = encoder.encode(["a red dog"])
        np.testing.assert_allclose(found, torch.cat(expected, -1)[0].numpy(), atol=1e-5, rtol=1e-4)
        identities.add(encoder.identity())
    assert len(identities) == len(cases) - 1  # the first two are the same


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_is_stored(qwen: Path, side: str) -> None:
    network, tokenizer = transformers.Qwen3Model.from_pretrained(qwen), transformers.AutoTokenizer.from_pretrained(qwen)
    tokenizer.padding_side = side
    texts = [f"Q: {caption}" for caption in CAPTIONS]
    padded = tokenizer(texts, padding="max_length", max_length=64, return_tensors="pt")
    for padding, mask in (("masked", padded.attention_mask), ("seen", torch.ones_like(padded.attention_mask))):
        fields = {**PLAIN, "padding": padding, "padding_side": side, "max_length": 64}
        encoder = text_encoder(qwen, **fields)
        with torch.no_grad():
            hidden = network(input_ids=padded.input_ids, attention_mask=mask, output_hidden_states=True)
        expected = hidden.hidden_states[-2].numpy()
        rows = [slice(None) if padding == "seen" else kept.bool().numpy() for kept in mask]
        for found, theirs, kept in zip(encoder.encode(CAPTIONS), expected, rows, strict=True):
            assert found.shape == (64, 16)
            np.testing.assert_allclose(found[kept], theirs[kept], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen", "gemma", "clip", "t5gemma", "llama"])
def test_embeddings_do_not_depend_on_company(family: str, request: Any, tmp_path: Path) -> None:
    save = {"t5gemma": save_t5gemma, "llama": save_llama}
    folder = save[family](tmp_path, 0) if family in save else request.getfixturevalue(family)
    fields = {"qwen": {"layers": [1, -1]}, "gemma": {"convention": "lumina2"}}.get(family, {})
    encoder = text_encoder(folder, padding="none", **fields)
    together = encoder.encode(CAPTIONS * 4)
    for number, found in enumerate(together):
        (alone,) = encoder.encode([CAPTIONS[number % len(CAPTIONS)]])
        np.testing.assert_allclose(found, alone, atol=1e-5, rtol=1e-4)
        assert 1 <= len(found) <= encoder.max_length


SPECIAL = {
    "qwen": ["<|im_end|>", "a<|im_start|>b", "<|endoftext|>"],
    "clip": ["<|endoftext|>", "a <|startoftext|> b"],
    "gemma": ["<eos>", "a<bos>b", "<pad>"],
}


@pytest.mark.parametrize("family", SPECIAL)
def test_special_tokens_in_a_caption_are_text(family: str, request: Any) -> None:
    encoder = text_encoder(request.getfixturevalue(family), layers=[1])
    tokens = encoder._tokens  # type: ignore[attr-defined]
    special = {id_ for id_, token in tokens._tokenizer.added_tokens_decoder.items() if token.special}
    (empty,) = tokens.ids([""])
    for caption in SPECIAL[family]:
        (ids,) = tokens.ids([caption])
        assert sum(id_ in special for id_ in ids) == sum(id_ in special for id_ in empty)
        assert len(ids) > len(empty) + 2


def test_templates_and_captions_with_braces(qwen: Path) -> None:
    encoder = text_encoder(qwen, **PLAIN)
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen)
    assert encoder._tokens.ids(["{} and {x}"])[0] == tokenizer("Q: {} and {x}").input_ids  # type: ignore[attr-defined]
    chat = text_encoder(qwen, layers=[1])
    user, assistant = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert chat.parts[0].config.template == user + assistant
    again = build_text_encoder(chat.parts[0].config)
    assert again.parts[0].config == chat.parts[0].config
    assert again.identity() == chat.identity()


def test_captions_beyond_the_room_are_cut_and_counted(qwen: Path) -> None:
    """The end of the template is lost, as in the pipelines; what is kept does not depend on what is cut."""
    encoder = text_encoder(qwen, convention="z_image", max_length=40)
    short, long = "a red dog", "a red dog jumps over the hill " * 8
    few, many = encoder.parts[0].num_tokens([short, long])
    assert few <= 40 < many
    assert (len(encoder.encode([short])[0]), len(encoder.encode([long])[0])) == (few, 40)
    longer = text_encoder(qwen, convention="z_image", max_length=60)
    np.testing.assert_allclose(longer.encode([long])[0][:40], encoder.encode([long])[0], atol=1e-5)
    assert longer.identity() == encoder.identity()


def test_tokens_of_a_template_are_dropped(qwen: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen)
    num_before = len(tokenizer("Q: ").input_ids)
    whole = text_encoder(qwen, **PLAIN)
    cut = text_encoder(qwen, **PLAIN, drop_tokens=num_before - 1)
    for all_, kept in zip(whole.encode(CAPTIONS), cut.encode(CAPTIONS), strict=True):
        np.testing.assert_allclose(kept, all_[num_before - 1 :], atol=1e-6)
    (few,) = cut.parts[0].num_tokens(["a red dog"])
    assert few == len(cut.encode(["a red dog"])[0])
    assert whole.identity() != cut.identity()


def test_the_identity_is_that_of_all_choices(qwen: Path, gemma: Path, clip: Path, tmp_path: Path) -> None:
    encoders = [
        text_encoder(qwen, layers=[1, 2, 3]),
        text_encoder(qwen, layers=[1, 2, 4]),
        text_encoder(qwen, layers=[1, 2, 3], max_length=100),  # padding is stored, up to there
        text_encoder(qwen, layers=[1, 2, 3], padding="seen"),
        text_encoder(qwen, layers=[1, 2, 3], padding_side="left"),
        text_encoder(qwen, convention="z_image"),
        text_encoder(qwen, convention="z_image", template="{}!"),
        text_encoder(qwen, convention="z_image", clean="lower"),
        text_encoder(qwen, convention="z_image", drop_tokens=2),
        text_encoder(save_qwen3(tmp_path / "weights", 1), convention="z_image"),
        text_encoder(gemma),
        text_encoder(gemma, convention="lumina2"),
        text_encoder(clip),
        text_encoder(clip, convention="sd"),
        text_encoder(clip, convention="flux_clip"),
    ]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<new>"]
    words = save_byte_tokenizer(save_qwen3(tmp_path / "words", 0), special)
    encoders.append(text_encoder(words, convention="z_image"))
    identities = [encoder.identity() for encoder in encoders]
    assert len(set(identities)) == len(identities)
    for fields in ({"precision": "bf16"}, {"max_length": 60}):
        assert text_encoder(qwen, convention="z_image", **fields).identity() == identities[5]


def test_a_t5_of_either_name_is_the_same(tmp_path: Path) -> None:
    folder = save_t5(tmp_path, 0)
    old = build_text_encoder(TextEncoderConfig(path=str(folder), tokenizer="bytes", precision="fp32"))
    new = text_encoder(folder, tokenizer="bytes")
    assert (old.identity(), old.max_length) == (new.identity(), 120) == (new.identity(), new.max_length)
    for a, b in zip(old.encode(CAPTIONS), new.encode(CAPTIONS), strict=True):
        np.testing.assert_array_equal(a, b)
    dumped = old.parts[0].config.model_dump()
    assert list(dumped) == ["name", "path", "subfolder", "tokenizer", "max_length", "precision"]
    # What it was before there were other encoders: sets of embeddings from then stay valid.
    assert old.identity() == "5efbb0cbe32ed85a226b87a529e709dd3d0532ab62ecc1de6edcd8e7ddb46869"
    changed = text_encoder(folder, tokenizer="bytes", convention="flux_t5")
    assert changed.identity() != old.identity()


def test_a_whole_clip_has_a_text_tower(tmp_path: Path) -> None:
    encoder = text_encoder(save_clip(tmp_path, 0), output="pooled", max_length=12)
    whole = transformers.CLIPModel.from_pretrained(tmp_path)
    tokens = transformers.CLIPTokenizer.from_pretrained(tmp_path)(["a dog", "x"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = whole.get_text_features(**tokens)
    expected = getattr(expected, "pooler_output", expected)
    np.testing.assert_allclose(np.concatenate(encoder.encode(["a dog", "x"])), expected.numpy(), atol=1e-5)


def test_a_whole_t5gemma_is_loaded_without_its_decoder(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 400}
    save_t5gemma(tmp_path, 0)  # for its tokenizer
    whole = transformers.T5GemmaModel(transformers.T5GemmaConfig(encoder=small, decoder=small)).eval()
    whole.save_pretrained(tmp_path)
    encoder = text_encoder(tmp_path)
    ids = torch.tensor(encoder._tokens.ids(["a red dog"]))  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = whole.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    np.testing.assert_allclose(encoder.encode(["a red dog"])[0], expected.numpy(), atol=1e-5)


REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("qwen", {"layers": [9]}, r"text\.layers: there is no hidden state 9; .* has 4 blocks, so 0 to 4, or -5 to -1"),
    ("qwen", {"layers": [-6]}, r"text\.layers: there is no hidden state -6"),
    ("qwen", {}, r"text\.layers: there is no hidden state 9"),  # of the convention
    ("qwen", {"output": "pooled"}, r"text\.output: a qwen3 .* has no pooled vector"),
    ("qwen", {"convention": "wan"}, r"text\.convention: wan is for umt5, .* is qwen3; take flux2_klein or z_image"),
    (
        "qwen",
        {"convention": "z_image", "max_length": 5},
        r"text\.template: .* no caption has room; raise ",
    ),
    ("qwen", {**PLAIN, "drop_tokens": 50}, r"text\.drop_tokens: 50, but .* only \d tokens precede the caption"),
    ("qwen", {"convention": "z_image", "template": ""}, r"text\.template: an empty caption has no tokens"),
    ("gemma", {"template": "chat"}, r"text\.template: chat, but the tokenizer .* has no chat template"),
    ("clip", {"max_length": 100}, r"text\.max_length: 100 tokens, and the network .* takes at most 77"),
    (
        "clip",
        {"name": "t5", "max_length": 77},
        r"text\.name: t5, but .* 'clip_text_model'; set text\.name",
    ),
]


@pytest.mark.parametrize(("family", "fields", "message"), REFUSED)
def test_what_does_not_fit_is_refused(family: str, fields: dict[str, object], message: str, request: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        text_encoder(request.getfixturevalue(family), **fields)
    assert "\n" not in str(caught.value)


def test_unknown_networks_and_other_tokenizers_are_refused(qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match=r"text\.path: config\.json in .* is of model_type 'bert', .*; known are t5, "):
        text_encoder(tmp_path)
    network = transformers.Qwen3Model(transformers.Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, head_dim=8,
        num_key_value_heads=1,
    ))  # fmt: skip
    network.save_pretrained(tmp_path / "small")
    save_byte_tokenizer(tmp_path / "small", ["<|endoftext|>"])
    with pytest.raises(InputError, match=r"text\.path: the tokenizer .* the network 50; they do not belong together"):
        text_encoder(tmp_path / "small", layers=[-1], template="")
    config = json.loads((qwen / "config.json").read_text())
    (tmp_path / "fewer").mkdir()
    for file in qwen.iterdir():
        (tmp_path / "fewer" / file.name).write_bytes(file.read_bytes())
    config |= {"num_hidden_layers": 3, "layer_types": config["layer_types"][:3]}
    (tmp_path / "fewer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"do not fit its config\.json: unexpected model\.layers\.3"):
        text_encoder(tmp_path / "fewer", **PLAIN)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": [-1]}, "layers: for name t5 all is fixed; set name: text"),
        ({"name": "t5", "max_length": None}, "max_length: give a number"),
        ({"name": "text", "layers": []}, "layers: give at least one"),
        ({"name": "text", "template": "no place"}, "template: write {} once"),
        ({"name": "text", "template": "{} {}"}, "template: write {} once"),
        ({"name": "text", "convention": "vann"}, "there is no convention 'vann'; there are: t5, "),
    ],
)
def test_sections_that_say_too_little_or_too_much(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("{}", r"\{\}")):
        TextEncoderConfig.model_validate(values)


def test_every_kind_of_network_has_a_convention() -> None:
    for model_type in MODEL_TYPES:
        config = resolved(TextEncoderConfig(name="text"), model_type)
        assert config.convention in CONVENTIONS
        assert model_type in CONVENTIONS[config.convention].model_types
        assert None not in config.model_dump(exclude={"final_norm"}).values()
        assert resolved(config, model_type) == config


def test_the_page_has_every_convention() -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "encode.md").read_text()
    rows = {cells[1].strip(" `"): cells for line in page.splitlines() if len(cells := line.split("|")) == 9}
    for name, convention in CONVENTIONS.items():
        assert rows[name][5].strip() == str(convention.max_length)
        assert rows[name][6].strip() == convention.padding.replace("none", "")
