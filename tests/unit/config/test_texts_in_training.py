"""Conditions of a network of clips: texts of one length, some of them dropped, and prompts that are cut."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
import torch

from pomscale.base.condition import Text, batch_size, device_of, join_conditions, map_condition
from pomscale.codecs import build_text_encoder
from pomscale.config.text import TextEncoderConfig
from pomscale.config.train import TrainRecipe
from pomscale.data.loader import MicroBatch
from pomscale.data.texts import null_text, text_batch
from pomscale.sampling.prompts import embed_prompts
from pomscale.shards.schema import TextInfo
from pomscale.training.loss import draw_batch
from support.tiny_models import save_t5

MAX_LENGTH, DIM = 6, 3
NULL = np.array([[7, 8, 9], [10, 11, 12]], "<f2")
TEXTS = TextInfo(
    config=TextEncoderConfig(path="x", max_length=MAX_LENGTH),
    identity="t",
    dim=DIM,
    null_length=len(NULL),
    null_embedding=base64.b64encode(NULL.tobytes()).decode(),
)


def micro_batch(size: int, longest: int, shape: tuple[int, ...] = (4, 6, 2, 2)) -> MicroBatch:
    lengths = torch.arange(size) % longest + 1
    text = torch.ones(size, longest, DIM, dtype=torch.float16)
    text[torch.arange(longest) >= lengths[:, None]] = 0
    return MicroBatch(
        latents=torch.zeros(size, *shape, dtype=torch.float16),
        condition=torch.full((size,), -1),
        text=text,
        text_lengths=lengths,
        positions=torch.arange(size) + 1000,
        weights=torch.ones(size),
        bad=(),
    )


def recipe(**diffusion: object) -> TrainRecipe:
    return TrainRecipe.model_validate(
        {
            "kind": "train",
            "name": "x",
            "codec": {"name": "vae", "path": "none"},
            "data": {"path": "x"},
            "model": {
                "kind": "video", "latent_shape": (4, 6, 2, 2), "text_dim": DIM, "dim": 8, "depth": 1, "num_heads": 1,
                "temporal": "block_causal",
            },
            "diffusion": diffusion,
            "training": {"total_samples": 64, "global_batch": 64},
            "checkpoint": {"every_samples": 64},
        }
    )  # fmt: skip


def test_texts_have_one_length_whoever_meets() -> None:
    short, long = (text_batch(micro_batch(size, longest), TEXTS) for size, longest in ((3, 2), (9, 6)))
    assert short.embeddings.shape == (3, MAX_LENGTH, DIM)
    assert long.embeddings.shape == (9, MAX_LENGTH, DIM)
    assert short.mask.tolist() == [[True] + [False] * 5, [True] * 2 + [False] * 4, [True] + [False] * 5]
    assert (short.embeddings[~short.mask] == 0).all()


def test_a_dropped_caption_is_the_stored_null_embedding() -> None:
    batch = micro_batch(64, 5)
    drawn = draw_batch(recipe(condition_dropout=0.3), batch, TEXTS)
    kept = draw_batch(recipe(condition_dropout=0.0), batch, TEXTS)
    assert isinstance(drawn.condition, Text)
    assert isinstance(kept.condition, Text)
    null = null_text(TEXTS)
    assert null.embeddings[0, : len(NULL)].tolist() == NULL.tolist()
    assert null.mask.tolist() == [[True, True, False, False, False, False]]
    dropped = torch.tensor([bool((row == null.embeddings[0]).all()) for row in drawn.condition.embeddings])
    assert 10 < int(dropped.sum()) < 30
    assert (drawn.condition.mask[dropped] == null.mask).all()
    assert drawn.condition.embeddings[~dropped].equal(kept.condition.embeddings[~dropped])
    assert kept.condition.embeddings.equal(text_batch(batch, TEXTS).embeddings)


def test_draws_of_clips_depend_on_the_position_alone() -> None:
    config = recipe(time={"per_frame_group": True}, max_start_group=5)
    whole = draw_batch(config, micro_batch(64, 4), TEXTS)
    assert whole.t.shape == (64, 3)  # 6 frames in groups of 2
    assert whole.start is not None
    assert set(whole.start.tolist()) == set(range(6))
    assert len(set(whole.t.flatten().tolist())) == 3 * 64
    batch = micro_batch(64, 4)
    part = MicroBatch(batch.latents[40:44], batch.condition[40:44], batch.text[40:44], batch.text_lengths[40:44],  # type: ignore[index]
                      batch.positions[40:44], batch.weights[40:44], ())  # fmt: skip
    alone = draw_batch(config, part, TEXTS)
    assert alone.t.equal(whole.t[40:44])
    assert alone.start is not None
    assert alone.start.equal(whole.start[40:44])
    picture = draw_batch(config, micro_batch(4, 4, (4, 1, 2, 2)), TEXTS)
    assert picture.t.shape == (4, 1)
    assert draw_batch(recipe(), micro_batch(4, 4), TEXTS).t.shape == (4,)


def test_a_long_prompt_is_cut_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_t5(tmp_path, 0)
    config = TextEncoderConfig(path=str(tmp_path), tokenizer="bytes", max_length=8, precision="fp32")
    encoder = build_text_encoder(config)
    texts = embed_prompts(encoder, ["seven l", "eleven char", ""])
    said = capsys.readouterr().err
    assert "'eleven char': 12 tokens" in said
    assert "the last 4 are left out" in said
    assert "seven" not in said
    assert texts.embeddings.shape == (3, 8, 16)
    assert texts.mask.sum(1).tolist() == [8, 8, 1]
    assert texts.embeddings[2, :1].equal(torch.from_numpy(encoder.encode([""])[0]).half())


def test_conditions_as_batches() -> None:
    classes = join_conditions([torch.tensor([1, 2]), torch.tensor([3])])
    assert batch_size(classes) == 3
    short = Text(torch.ones(1, 2, DIM), torch.ones(1, 2, dtype=torch.bool))
    long = Text(torch.full((2, 4, DIM), 2.0), torch.ones(2, 4, dtype=torch.bool))
    both = join_conditions([short, long])
    assert isinstance(both, Text)
    assert both.embeddings.shape == (3, 4, DIM)
    assert both.mask.tolist() == [[True, True, False, False], [True] * 4, [True] * 4]
    assert batch_size(both) == 3
    assert device_of(map_condition(both, lambda part: part.to("meta"))) == torch.device("meta")
