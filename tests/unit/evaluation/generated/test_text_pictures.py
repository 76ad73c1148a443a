"""Pictures that a model of texts draws for an evaluation: those of `sample`, with their prompts as captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pomscale.base.errors import InputError
from pomscale.codecs.extractors import build_extractor
from pomscale.evaluation.generated.evaluate import evaluate
from pomscale.evaluation.generated.evaluation import Evaluation
from pomscale.evaluation.generated.generated_pictures import PicturesOfTexts
from pomscale.evaluation.generated.opening import Opening
from pomscale.evaluation.generated.request import Request
from pomscale.evaluation.generated.trained_model import Drawing, ModelSource
from pomscale.media.sheets import to_bytes
from pomscale.metrics.kernels import clip_score
from pomscale.pretrained.load import load_pretrained
from pomscale.sampling.api import decode, sample
from support.running import pomscale
from support.tiny_films import save_picture_model, save_text_picture_model
from support.tiny_models import save_clip

PROMPTS = ["three left", "one right", "four"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_picture_model(tmp_path_factory.mktemp("texts"), sampling={"prompts": PROMPTS})


def test_pictures_are_those_of_sample_each_with_its_prompt(model: Path) -> None:
    drawn = PicturesOfTexts(ModelSource(model, device="cpu"), Drawing(num=7, seed=5, changes={"num_steps": 2}))
    assert drawn.size == (20, 12)
    whole = [one for one in drawn.batches(0, 7, 3)]
    captions = [caption for one in whole for caption in one.captions or []]
    assert captions == [*PROMPTS, *PROMPTS, PROMPTS[0]]
    assert whole[0].labels is None
    network = load_pretrained(model, device="cpu")
    pictures = to_bytes(decode(network, sample(network, captions, seeds=range(5, 12), num_steps=2)).clamp(0, 1))
    found = torch.cat([one.pixels for one in whole])
    torch.testing.assert_close(found, torch.from_numpy(pictures), atol=1, rtol=0)


def test_prompts_and_sizes_that_are_asked_for(model: Path, tmp_path: Path) -> None:
    drawing = Drawing(num=2, changes={"num_steps": 1}, prompts=("six",), size=(12, 28))
    drawn = PicturesOfTexts(ModelSource(model, device="cpu"), drawing)
    (batch,) = drawn.batches(0, 2, 2)
    assert (batch.captions, batch.pixels.shape, drawn.size) == (["six", "six"], (2, 3, 12, 28), (12, 28))
    settings = drawn.settings()["drawn"]
    assert settings["prompts"]["number"] == 1
    assert settings["size"] == [12, 28]
    usual = PicturesOfTexts(ModelSource(model, device="cpu"), Drawing(num=2)).settings()["drawn"]
    assert usual["prompts"] != settings["prompts"]
    silent = save_text_picture_model(tmp_path)
    with pytest.raises(InputError, match=r"say with --prompts or --prompt what the pictures are to show"):
        PicturesOfTexts(ModelSource(silent, device="cpu"), Drawing())


def test_the_clip_score_is_that_of_pictures_and_prompts(model: Path, tmp_path: Path) -> None:
    spec = f"clip:{save_clip(tmp_path / 'clip', seed=0)}"
    drawing = Drawing(num=4, changes={"num_steps": 1})
    opening = Opening(num=4, model=ModelSource(Path(), device="cpu"), drawing=drawing)
    request = Request(str(model), None, (spec,), metrics=("clip_score",), opening=opening, work=tmp_path / "work")
    result = evaluate(Evaluation(request), progress=False).result
    assert result is not None
    clip: Any = build_extractor(spec)
    (batch,) = PicturesOfTexts(ModelSource(model, device="cpu"), Drawing(num=4, changes={"num_steps": 1})).batches(
        0, 4, 4
    )
    features = clip.extract(batch.pixels)["pooled"].numpy()
    expected = clip_score(features, clip.embed_texts(batch.captions).numpy()).mean()
    assert result["metrics"]["clip_score"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("texts", ["--classes", "1"], "--classes: only where a model draws pictures of classes"),
        ("texts", ["--frames", "8"], "--frames: only where a model draws clips"),
        ("classes", ["--prompt", "a"], "--prompt: only where a model draws by prompts"),
    ],
)
def test_options_that_would_count_for_nothing_are_refused(
    model: Path, tmp_path: Path, kind: str, options: list[str], expected: str
) -> None:
    source = model if kind == "texts" else save_picture_model(tmp_path / "classes")
    out = tmp_path / "x.npz"
    done = pomscale(
        "evaluate", "images", source, "--device", "cpu", "--dry-run", "--write-npz", out, *options, expect=2
    )  # fmt: skip
    assert expected in done.stderr
