"""A model of clips whose captions went through several text encoders: its card loads all of them for prompts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import pomscale
from pomscale.base.errors import InputError
from pomscale.config.text import TextEncoderConfig
from pomscale.data.texts import null_text
from pomscale.sampling.prompts import embed_prompts
from pomscale.shards.texts import joined
from support.tiny_films import MAX_LENGTH, TEXT_DIM, save_model
from support.tiny_text_encoders import save_clip_text, save_clip_tokenizer, save_qwen3

PROMPTS = ["a red dog", "", "a red dog that is longer than twelve bytes"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_clip_tokenizer(save_clip_text(tmp_path / "clip", 0, projected=True))
    pooled = TextEncoderConfig(name="text", path=str(tmp_path / "clip"), output="pooled", precision="fp32")
    return save_model(tmp_path, beside=[pooled])


def test_prompts_go_through_all_encoders(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = pomscale.load_pretrained(folder)
    encoder = model.text_encoder  # type: ignore[union-attr]
    texts = embed_prompts(encoder, PROMPTS)
    assert "the last 31 are left out" in capsys.readouterr().err  # of T5; the other takes 77 tokens
    assert texts.embeddings.shape == (3, MAX_LENGTH + 1, TEXT_DIM)
    for prompt, row, mask in zip(PROMPTS, texts.embeddings, texts.mask, strict=True):
        expected = joined([part.encode([prompt])[0] for part in encoder.parts])
        assert expected.shape[1] == TEXT_DIM
        assert int(mask.sum()) == len(expected)
        np.testing.assert_allclose(row[mask].numpy(), expected, atol=2e-3)
        assert not row[~mask].any()
    null = null_text(model.card.texts)
    assert null.mask.equal(texts.mask[1:2])
    torch.testing.assert_close(null.embeddings, texts.embeddings[1:2])
    clips = pomscale.sample(model, PROMPTS[:1], num_steps=2, guidance=1.0, seeds=[0])
    assert torch.isfinite(clips).all()


def test_encoders_in_several_folders_do_not_move_to_one(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"text_path: .* is one folder, and .* 2 text encoders lie in several"):
        _ = pomscale.load_pretrained(folder, text_path=str(tmp_path / "t5")).text_encoder  # type: ignore[union-attr]


def test_encoders_in_subfolders_of_one_move_together(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    save_clip_tokenizer(save_clip_text(pipeline / "text_encoder_2", 0, projected=False))
    beside = TextEncoderConfig(
        name="text", path=str(pipeline), subfolder="text_encoder_2", convention="flux_clip", precision="fp32"
    )
    folder = save_model(tmp_path, beside=[beside])
    shutil.move(pipeline, tmp_path / "moved")
    shutil.copytree(tmp_path / "t5", tmp_path / "moved", dirs_exist_ok=True)
    with pytest.raises(InputError, match=r"text\.path: cannot load .*--text-path"):
        _ = pomscale.load_pretrained(folder).text_encoder  # type: ignore[union-attr]
    moved = pomscale.load_pretrained(folder, text_path=str(tmp_path / "moved"))
    assert moved.text_encoder.identity() == moved.card.texts.joint_identity  # type: ignore[union-attr]


def test_other_weights_of_one_encoder_are_refused(folder: Path, tmp_path: Path) -> None:
    save_clip_text(tmp_path / "clip", 1, projected=True)
    with pytest.raises(InputError, match=r"text encoder .*clip: its weights are not those"):
        _ = pomscale.load_pretrained(folder).text_encoder  # type: ignore[union-attr]


def test_prompts_beyond_float16_are_refused(tmp_path: Path) -> None:
    save_qwen3(tmp_path / "qwen", 0)
    raw = {"name": "text", "path": str(tmp_path / "qwen"), "layers": [1], "padding": "none", "precision": "fp32"}
    folder = save_model(tmp_path, beside=[TextEncoderConfig.model_validate(raw)])
    model = pomscale.load_pretrained(folder)
    model.text_encoder.parts[1]._network.module.embed_tokens.weight.data.mul_(1e6)  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"prompt 'a red dog': its embedding does not fit float16"):
        embed_prompts(model.text_encoder, PROMPTS)  # type: ignore[union-attr]
