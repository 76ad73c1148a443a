from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pomscale.base.errors import InputError
from pomscale.codecs import TextEncoder, build_text_encoder
from pomscale.config.text import TextEncoderConfig
from support.tiny_models import save_sentencepiece, save_t5

CAPTIONS = ["a red dog", "", "a very old horse walks over the river and the hill", "a", "naïve 馬 🐴", "a red dog"]


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("byt5"), seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Network and tokenizer side by side, as T5 lies on the hub."""
    folder = save_t5(tmp_path_factory.mktemp("t5"), seed=0, vocab_size=128)
    return save_sentencepiece(folder)


def text_encoder(path: Path, **changes: object) -> TextEncoder:
    settings: dict[str, object] = {"path": str(path), "precision": "fp32", "max_length": 40}
    return build_text_encoder(TextEncoderConfig.model_validate(settings | changes))


@pytest.mark.parametrize("tokenizer", ["bytes", "pretrained"])
def test_embeddings_are_those_of_each_caption_alone(byte_folder: Path, folder: Path, tokenizer: str) -> None:
    """Against the network itself, without padding and mask: neither order nor company nor batching matters."""
    encoder = text_encoder(byte_folder if tokenizer == "bytes" else folder, tokenizer=tokenizer)
    captions = CAPTIONS * 50  # several forwards
    embeddings = encoder.encode(captions)
    for caption, embedding in zip(captions, embeddings, strict=True):
        ids = encoder._tokens._tokenizer(caption).input_ids[:40]  # type: ignore[attr-defined]
        ids[-1] = 1  # the end token is kept where a caption is cut
        alone = encoder._network.module(input_ids=torch.tensor([ids])).last_hidden_state[0]  # type: ignore[attr-defined]
        assert embedding.dtype == np.float32
        assert embedding.shape == (len(ids), encoder.dim)
        np.testing.assert_allclose(embedding, alone.numpy(), atol=1e-5)
    assert embeddings[1].shape == (1, 16)


def test_bytes_are_those_of_utf8(byte_folder: Path) -> None:
    encoder = text_encoder(byte_folder, tokenizer="bytes", max_length=8)
    lengths = [len(embedding) for embedding in encoder.encode(["abc", "", "é", "1234567", "12345678", "x" * 1000])]
    assert lengths == [4, 1, 3, 8, 8, 8]
    assert encoder.num_tokens(["abc", "", "1234567", "12345678", "x" * 5000]) == [4, 1, 8, 9, 5001]


def test_words_of_the_vocabulary_are_known(folder: Path) -> None:
    encoder = text_encoder(folder, max_length=4)
    first, second = (encoder.encode([caption])[0] for caption in ("red dog", "green cat"))
    assert not np.allclose(first[0], second[0])
    few, many = encoder.num_tokens(["red", "a red dog jumps over the lazy fox"])
    assert few <= 4 < many
    assert len(encoder.encode(["a red dog jumps over the lazy fox"])[0]) == 4


# A text that looks like a special token, one that does so after normalisation, and one with such a token inside.
LOOK_ALIKES = ["</s>", "＜/s＞", "a red</s>dog", "<pad>", " <unk> ", "<extra_id_0> dog"]


@pytest.mark.parametrize("caption", LOOK_ALIKES)
def test_bytes_of_a_special_token_are_text(byte_folder: Path, caption: str) -> None:
    encoder = text_encoder(byte_folder, tokenizer="bytes")
    assert token_ids(encoder, caption) == [byte + 3 for byte in caption.encode()] + [1]


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json", "tokenizer.json with extra tokens"])
def test_words_of_a_special_token_are_text(folder: Path, tmp_path: Path, file: str) -> None:
    """Against sentencepiece itself, for which no text is a control token."""
    sentencepiece, transformers = pytest.importorskip("sentencepiece"), pytest.importorskip("transformers")
    encoder, path = text_encoder(folder), folder
    if file != "spiece.model":
        path = save_t5(tmp_path, seed=0, vocab_size=256)
        extra_ids = 100 if "extra" in file else 0
        transformers.T5Tokenizer.from_pretrained(folder, extra_ids=extra_ids).save_pretrained(path)
        assert not (path / "spiece.model").exists()
        encoder = text_encoder(path)
    exact = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    for caption in [*LOOK_ALIKES, *CAPTIONS, "zebra <x>"]:
        assert token_ids(encoder, caption) == [*exact.encode(caption), 1], caption
    with_end, empty = encoder.encode(["</s>", ""])
    assert len(with_end) > len(empty) == 1


def token_ids(encoder: TextEncoder, caption: str) -> list[int]:
    """The ids that `encode` hands to the network."""
    (ids,) = encoder._tokens._tokenizer([caption]).input_ids  # type: ignore[attr-defined]
    assert encoder.num_tokens([caption]) == [len(ids)] == [len(encoder.encode([caption])[0])]
    return list(ids)


def test_bf16_is_close_to_fp32_and_fits_float16(byte_folder: Path, tmp_path: Path) -> None:
    exact = text_encoder(byte_folder, tokenizer="bytes")
    rough = text_encoder(byte_folder, tokenizer="bytes", precision="bf16")
    for a, b in zip(exact.encode(CAPTIONS), rough.encode(CAPTIONS), strict=True):
        assert b.dtype == np.float32
        np.testing.assert_allclose(b, a, atol=0.1)

    # However large the activations are, the last norm bounds them.
    network = exact._network.module  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(100)
        network.encoder.final_layer_norm.weight.copy_(torch.linspace(-50, 50, 16))
    network.save_pretrained(tmp_path)
    bound = 50 * math.sqrt(16)
    for precision in ("fp32", "bf16"):
        largest = max(
            np.abs(x).max() for x in text_encoder(tmp_path, tokenizer="bytes", precision=precision).encode(CAPTIONS)
        )
        assert 0.2 * bound < largest <= 1.01 * bound


def test_the_identity_is_that_of_network_and_tokenizer(byte_folder: Path, folder: Path, tmp_path: Path) -> None:
    encoder = text_encoder(byte_folder, tokenizer="bytes")
    for change in ({"precision": "bf16"}, {"max_length": 7}):
        assert text_encoder(byte_folder, **{"tokenizer": "bytes"} | change).identity() == encoder.identity()
    encoder.encode(CAPTIONS)
    encoder.num_tokens(CAPTIONS)
    assert text_encoder(byte_folder, tokenizer="bytes").identity() == encoder.identity()

    others = [
        text_encoder(save_t5(tmp_path / "weights", seed=1), tokenizer="bytes"),
        text_encoder(save_t5(tmp_path / "norm", seed=0, layer_norm_epsilon=1e-3), tokenizer="bytes"),
        text_encoder(folder),
        text_encoder(save_sentencepiece(save_t5(tmp_path / "words", seed=0, vocab_size=128), animals=["zebra"])),
    ]
    assert len({encoder.identity(), *(other.identity() for other in others)}) == 5


@pytest.mark.parametrize("number", ["", "_2"])
def test_the_layout_of_diffusers(tmp_path: Path, number: str) -> None:
    """Encoder and tokenizer in folders side by side."""
    save_t5(tmp_path / f"text_encoder{number}", seed=0, vocab_size=128)
    save_sentencepiece(tmp_path / f"tokenizer{number}")
    encoder = text_encoder(tmp_path, subfolder=f"text_encoder{number}")
    assert encoder.encode(["a red dog"])[0].shape[1] == 16


def test_a_whole_t5_is_loaded_without_its_decoder(tmp_path: Path, folder: Path) -> None:
    """As google/t5-v1_1-xxl lies on the hub."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config.from_pretrained(save_t5(tmp_path, seed=0))
    config.is_encoder_decoder, config.tie_word_embeddings = True, False
    torch.manual_seed(0)
    whole = transformers.T5ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    encoder = text_encoder(tmp_path, tokenizer="bytes")
    with torch.no_grad():
        expected = whole.encoder(input_ids=torch.tensor([[100, 101, 1]])).last_hidden_state[0]
    np.testing.assert_allclose(encoder.encode(["ab"])[0], expected.numpy(), atol=1e-6)


def test_what_is_missing_or_does_not_fit_is_told(byte_folder: Path, folder: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    with pytest.raises(InputError, match=r"text\.path: cannot load a text encoder from .*nowhere"):
        text_encoder(tmp_path / "nowhere")
    with pytest.raises(
        InputError, match=r"text\.path: no tokenizer\.json or spiece\.model or .* text\.tokenizer=bytes"
    ):
        text_encoder(byte_folder)  # transformers would make up a tokenizer here
    with pytest.raises(InputError, match=r"bytes are 384 tokens.* has 128.*text\.tokenizer=pretrained"):
        text_encoder(folder, tokenizer="bytes")
    small = save_sentencepiece(save_t5(tmp_path / "small", seed=0, vocab_size=20))
    with pytest.raises(InputError, match=r"tokenizer .* tokens, and the network 20; they do not belong together"):
        text_encoder(small)

    (path,) = save_t5(tmp_path / "torn", seed=0).glob("*.safetensors")
    weights = safetensors.load_file(path)
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    safetensors.save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"do not fit its config\.json: .*missing.*SelfAttention\.q"):
        text_encoder(path.parent, tokenizer="bytes")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"text\.path: cannot load"):
        text_encoder(path.parent, tokenizer="bytes")

    config = json.loads((folder / "config.json").read_text())
    save_t5(tmp_path / "layers", seed=0)
    (tmp_path / "layers" / "config.json").write_text(json.dumps(config | {"num_layers": 1}))
    with pytest.raises(InputError, match=r"text\.path"):
        text_encoder(tmp_path / "layers", tokenizer="bytes")
    (folder / "broken").mkdir()
    (tmp_path / "layers" / "spiece.model").write_bytes(b"no model")
    (tmp_path / "layers" / "config.json").write_text(json.dumps(config | {"vocab_size": 384}))
    with pytest.raises(InputError, match=r"text\.path: cannot load the tokenizer"):
        text_encoder(tmp_path / "layers")


def test_without_transformers_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("network", "tokens", "encoder"):
        monkeypatch.delitem(sys.modules, f"pomscale.codecs.text.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"text .*transformers.*pip install -e '\.\[text\]'"):
        build_text_encoder(TextEncoderConfig())
