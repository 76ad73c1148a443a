"""Several text encoders in one set: stored each by itself, read one behind the other, checked, split and merged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.check.repair import repair
from data_pipelines.check.verify import verify
from data_pipelines.derive.merge import merge
from data_pipelines.derive.split import split
from data_pipelines.encode.dry_run import describe
from data_pipelines.encode.encode import encode
from data_pipelines.inspect.info import info
from data_pipelines.inspect.show import show
from data_pipelines.inspect.stats import stats
from pomscale.base.errors import InputError
from pomscale.codecs import build_text_encoder
from pomscale.config.encode import EncodeRecipe
from pomscale.data.dataset import LatentDataset
from pomscale.data.readers.texts import null_embedding
from pomscale.data.texts import null_text
from pomscale.shards.schema import INDEX_NAME, Normalization, read_manifest
from support.encoding import shard_members
from support.tiny_models import save_t5
from support.tiny_text_encoders import save_clip_text, save_clip_tokenizer, save_qwen3

CAPTIONS = [
    ["a red dog", "dog"],
    ["a green cat"],
    ["blue", "a small blue bird that sings a very long song", "bird"],
    ["x"],
]

pytestmark = pytest.mark.usefixtures("encoders")


@pytest.fixture
def encoders(tmp_path: Path) -> list[dict[str, object]]:
    """A pooled CLIP of 12 values, a T5 of 16, and two layers of a Qwen3, 32."""
    save_clip_tokenizer(save_clip_text(tmp_path / "clip", 0, projected=True))
    save_t5(tmp_path / "t5", 0)
    save_qwen3(tmp_path / "qwen", 0)
    plain = {"name": "text", "precision": "fp32"}
    return [
        {**plain, "path": str(tmp_path / "clip"), "output": "pooled"},
        {"path": str(tmp_path / "t5"), "tokenizer": "bytes", "precision": "fp32", "max_length": 20},
        {**plain, "path": str(tmp_path / "qwen"), "layers": [1, 3], "padding": "none", "max_length": 64},
    ]


@pytest.fixture
def recipe(
    tmp_path: Path, pictures: Path, encoders: list[dict[str, object]], make_recipe: Callable[..., EncodeRecipe]
) -> EncodeRecipe:
    files = sorted(path.relative_to(pictures) for path in pictures.rglob("*.png"))
    rows = [{"path": str(file), "text": texts} for file, texts in zip(files, CAPTIONS, strict=False)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {
        "kind": "table",
        "path": f"{tmp_path}/t.jsonl",
        "root": str(pictures),
        "media": "{path}",
        "caption": "text",
    }
    return make_recipe(pictures, source=source, text=encoders, shard_samples=2)


def test_each_encoder_has_arrays_of_its_own(recipe: EncodeRecipe, tmp_path: Path) -> None:
    assert "text, text_1, text_2, text2, text2_1, text2_2, text3, text3_1, text3_2" in describe(recipe)
    report = encode(recipe, progress=False)
    assert report.exit_code == 0
    assert "1 captions were cut" in str(report)
    assert verify(recipe.output).problems == []
    manifest = read_manifest(recipe.output)
    assert manifest.text is not None
    assert (manifest.text.max_length, manifest.text.width) == (1 + 20 + 64, 32)
    assert [encoder.dim for encoder in manifest.text.encoders] == [12, 16, 32]
    firsts = [member.decode() for member in shard_members(Path(recipe.output), ".txt")]
    for config, encoder, arrays in zip(recipe.texts, manifest.text.encoders, manifest.arrays_by_encoder, strict=True):
        expected = build_text_encoder(config).encode(firsts)
        members = shard_members(Path(recipe.output), f".{arrays[0]}.npy")
        for member, embedding in zip(members, expected, strict=True):
            (tmp_path / "a.npy").write_bytes(member)
            found = np.load(tmp_path / "a.npy")
            assert found.shape == embedding.shape  # no zeros on disk
            np.testing.assert_allclose(found, embedding, atol=2e-3, rtol=2e-3)
        assert encoder.identity == build_text_encoder(encoder.config).identity()
    assert stats(recipe.output, progress=False).counts.texts.total() == 7
    assert "(1 to 85, 32) as a network sees them" in info(recipe.output)

    companion = recipe.model_dump() | {"codec": None, "transform": None, "output": str(tmp_path / "text")}
    companion["source"] = {"kind": "latents", "path": recipe.output}
    assert encode(EncodeRecipe.model_validate(companion), progress=False).exit_code == 0
    assert read_manifest(tmp_path / "text").text == manifest.text
    shown = show(tmp_path / "text", None, 9, tmp_path / "none.png").splitlines()
    joint = build_text_encoder(*recipe.texts)
    lengths = {
        text: len(embedding) for texts in CAPTIONS for text, embedding in zip(texts, joint.encode(texts), strict=True)
    }
    assert {line.split("tokens  ")[1]: int(line.split()[1]) for line in shown} == lengths


def test_a_network_sees_them_one_behind_the_other(recipe: EncodeRecipe) -> None:
    encode(recipe, progress=False)
    manifest = read_manifest(recipe.output)
    assert manifest.text is not None
    dataset = LatentDataset(recipe.output, manifest, Normalization.of(manifest, "codec"), text=recipe.output)
    joint = build_text_encoder(*recipe.texts)
    assert (joint.dim, joint.max_length) == (32, 85)
    assert joint.identity() == manifest.text.joint_identity
    known = {text: embedding for texts in CAPTIONS for text, embedding in zip(texts, joint.encode(texts), strict=True)}
    of_first = {texts[0]: texts for texts in CAPTIONS}
    firsts = [member.decode() for member in shard_members(Path(recipe.output), ".txt")]
    records, seen = np.arange(4), set()
    for positions in (records, records + 4, records + 100, records + 1000, records + 2000):
        samples = dataset.read(records, positions, seed=0, flip_probability=0.0)
        assert not samples.bad
        assert samples.text is not None
        assert samples.text_lengths is not None
        for first, row, length in zip(firsts, samples.text, samples.text_lengths.tolist(), strict=True):
            assert not row[length:].any()
            fits = [
                text
                for text in of_first[first]
                if len(known[text]) == length and np.allclose(row[:length], known[text], atol=2e-3, rtol=2e-3)
            ]
            assert len(fits) == 1
            seen.add(fits[0])
    assert len(seen) == 7

    (null,) = joint.encode([""])
    np.testing.assert_allclose(null_embedding(manifest.text), null, atol=2e-3, rtol=2e-3)
    whole = null_text(manifest.text)
    assert whole.embeddings.shape == (1, 85, 32)
    assert int(whole.mask.sum()) == len(null)
    assert not whole.embeddings[0, 0, 12:].any()  # the pooled vector, padded on channels


def test_a_damaged_array_of_one_encoder_is_a_fault_of_the_sample(recipe: EncodeRecipe) -> None:
    encode(recipe, progress=False)
    manifest = read_manifest(recipe.output)
    index = np.load(Path(recipe.output) / INDEX_NAME)
    (damaged, *_) = np.flatnonzero(index["text_1_length"] == 0).tolist()  # a record of one caption
    row = index[damaged]
    shard = Path(recipe.output) / manifest.shards[row["shard"]].name
    content = bytearray(shard.read_bytes())
    content[row["text3_offset"] + row["text3_length"] - 3] ^= 0xFF
    shard.write_bytes(content)
    assert any("text3" in problem for problem in verify(recipe.output).problems)
    dataset = LatentDataset(
        recipe.output, manifest, Normalization.of(manifest, "codec"), text=recipe.output, bad_samples="skip"
    )
    found = {}
    for positions in (np.arange(4), np.arange(4) + 4, np.arange(4) + 100):
        samples = dataset.read(np.arange(4), positions, seed=0, flip_probability=0.0)
        assert manifest.text is not None
        assert samples.text is not None
        assert samples.text_lengths is not None
        for number in samples.bad:
            null = null_embedding(manifest.text)
            assert samples.text_lengths[number] == len(null)
            assert torch.equal(samples.text[number, : len(null)], null)
        found |= samples.bad
    assert set(found) == {damaged}
    assert "text3.npy" in found[damaged].reason
    repair(recipe.output, progress=False)
    assert verify(recipe.output).problems == []


def test_sets_of_several_encoders_are_split_and_merged(
    recipe: EncodeRecipe, encoders: list[dict[str, object]], tmp_path: Path
) -> None:
    encode(recipe, progress=False)
    split(recipe.output, {tmp_path / "a": 0.5, tmp_path / "b": 0.5}, progress=False)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both", progress=False)
    assert verify(tmp_path / "both").problems == []
    before, after = read_manifest(recipe.output).text, read_manifest(tmp_path / "both").text
    assert before == after
    values = recipe.model_dump() | {"text": encoders[:2], "output": str(tmp_path / "fewer")}
    encode(EncodeRecipe.model_validate(values), progress=False)
    with pytest.raises(InputError, match="merge: text encoder of"):
        merge([Path(recipe.output), tmp_path / "fewer"], tmp_path / "none", progress=False)


def test_an_encode_is_resumed_only_with_the_same_encoders(
    recipe: EncodeRecipe, encoders: list[dict[str, object]]
) -> None:
    encode(recipe, progress=False)
    assert encode(recipe, progress=False).exit_code == 0
    for changed in (encoders[:2], [encoders[1], encoders[0], encoders[2]], encoders[1]):
        values = recipe.model_dump() | {"text": changed}
        with pytest.raises(InputError, match="text is"):
            encode(EncodeRecipe.model_validate(values), progress=False)


def test_a_list_of_one_is_one_encoder(recipe: EncodeRecipe, encoders: list[dict[str, object]], tmp_path: Path) -> None:
    """Its bytes are those that sets of one encoder always had: no new key, and the old name."""
    found = []
    for name, text in (("one", encoders[1]), ("list", [encoders[1]])):
        values = recipe.model_dump() | {"text": text, "output": str(tmp_path / name)}
        encode(EncodeRecipe.model_validate(values), progress=False)
        assert verify(tmp_path / name).problems == []
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        found.append([manifest["text"], manifest["shards"], manifest["index"]])
        assert list(manifest["text"]["config"]) == ["name", "path", "subfolder", "tokenizer", "max_length", "precision"]
        assert manifest["text"]["config"]["name"] == "t5"
        assert "beside" not in manifest["text"]
    assert found[0] == found[1]


def test_hidden_states_that_float16_cannot_hold_end_the_encode_at_once(
    recipe: EncodeRecipe, encoders: list[dict[str, object]], tmp_path: Path
) -> None:
    save_qwen3(tmp_path / "qwen", 0, scale=1e6)
    with pytest.raises(InputError, match=re.escape("text: the hidden states of") + ".*float16.*text.final_norm=true"):
        encode(recipe, progress=False)
    encoders[2]["final_norm"] = True
    values = recipe.model_dump() | {"text": encoders}
    assert encode(EncodeRecipe.model_validate(values), progress=False).exit_code == 0
