"""Several captions of one item: listed, embedded, stored, joined, merged, checked, and one drawn per sample."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data_pipelines.check.verify import verify
from data_pipelines.derive.join import join
from data_pipelines.derive.merge import merge
from data_pipelines.derive.split import split
from data_pipelines.encode.dry_run import describe
from data_pipelines.encode.encode import encode
from data_pipelines.encode.latents_source import build_encode_source
from data_pipelines.inspect.info import info
from data_pipelines.inspect.show import show
from data_pipelines.inspect.stats import stats
from pomscale.base.errors import InputError
from pomscale.base.keyed_random import Stream, keyed_uniforms
from pomscale.codecs import build_text_encoder
from pomscale.config.data import DataConfig
from pomscale.config.encode import EncodeRecipe
from pomscale.data.dataset import LatentDataset, Samples
from pomscale.data.mixture import Mixture
from pomscale.shards.schema import INDEX_NAME, TEXT_ARRAYS, Normalization, read_manifest
from pomscale.sources.protocol import Item
from support.encoding import shard_members
from support.synthetic_dataset import write_dataset
from support.tiny_models import save_t5

MakeRecipe = Callable[..., EncodeRecipe]

# -- sources -----------------------------------------------------------------------------------------------------------

ROWS: list[tuple[Any, str | list[str] | None, str | None]] = [
    (["one", " two "], ["one", "two"], None),
    (["only"], "only", None),
    (["first", None, "", "  ", "last"], ["first", "last"], None),
    (["same", "same"], ["same", "same"], None),
    ([], None, "its caption is empty"),
    (None, None, "its caption is missing"),
    ([f"{i}" for i in range(101)], None, "it has 101 captions, more than the 100 that a record can hold"),
]


def scan(path: Path, **options: Any) -> list[Item]:
    recipe = {"kind": "table", "path": str(path), "media": "{path}", "caption": "text", **options}
    values = {"kind": "encode", "name": "x", "output": "x", "source": recipe, "text": {"path": "x"}}
    return list(build_encode_source(EncodeRecipe.model_validate(values).source).scan())


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dictionary", "binary_view"])
def test_lists_in_tables_are_several_captions(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("t.jsonl" if kind == "jsonl" else "t.parquet")
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"path": "a.png", "text": texts}) + "\n" for texts, _, _ in ROWS))
    else:
        of_texts = {"dictionary": pa.dictionary(pa.int16(), pa.string()), "binary_view": pa.binary_view()}
        texts = pa.array([texts for texts, _, _ in ROWS], pa.list_(pa.string()))
        if kind in of_texts:
            texts = pa.ListArray.from_arrays(
                texts.offsets,
                texts.values.dictionary_encode() if kind == "dictionary" else texts.values.cast(pa.binary_view()),
                mask=texts.is_null(),
            )
        pq.write_table(pa.table({"path": ["a.png"] * len(ROWS), "text": texts}), path)
    items = scan(path)
    assert [(item.caption, item.problem) for item in items] == [(caption, problem) for _, caption, problem in ROWS]
    assert items[0].captions == ["one", "two"]
    assert (items[1].captions, items[4].captions) == (["only"], [])


def test_what_is_no_text_in_a_list_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"path": "a", "text": ["a", 5]}\n{"path": "a", "text": ["a", "\\ud800"]}\n')
    assert [item.problem for item in scan(tmp_path / "t.jsonl")] == [
        "its caption is no text but 5",
        "its caption is not UTF-8",
    ]


def test_lines_are_captions_where_the_recipe_says_so(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('path,text\na.png,"one\n\n two\u2028too\n"\nb.png,only\n', newline="\r\n")
    assert [item.caption for item in scan(tmp_path / "t.csv")] == ["one\r\n\r\n two\u2028too", "only"]
    items = scan(tmp_path / "t.csv", caption_lines=True)
    assert [item.caption for item in items] == [["one", "two\u2028too"], "only"]


def test_lines_of_texts_beside_clips(tmp_path: Path) -> None:
    for name, text in (("a", "one\ntwo\n"), ("b", "only\n")):
        (tmp_path / f"{name}.mp4").write_bytes(b"clip")
        (tmp_path / f"{name}.txt").write_text(text)
    source = {"kind": "video_folder", "path": str(tmp_path), "captions": True, "caption_lines": True}
    values = {"kind": "encode", "name": "x", "output": "x", "source": source, "text": {"path": "x"}}
    items = list(build_encode_source(EncodeRecipe.model_validate(values).source).scan())
    assert [item.caption for item in items] == [["one", "two"], "only"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": "first"}, "captions: says which captions are embedded, but there is no `text` section"),
        (
            {"source": {"kind": "video_folder", "path": "x", "caption_lines": True}},
            r"source\.caption_lines: the source has no captions",
        ),
    ],
)
def test_recipes_that_say_too_little(tmp_path: Path, make_recipe: MakeRecipe, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe(tmp_path, **changes)


# -- encode ------------------------------------------------------------------------------------------------------------

CAPTIONS = [["a red fox", "a fox in the snow", "fox"], ["grass"], ["blue sky", "the sky"], ["night"]]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A table of pictures with one to three captions."""
    lines = []
    for number, captions in enumerate(CAPTIONS):
        Image.new("RGB", (8, 8), (50 * number, 0, 9)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"path": f"{number}.png", "key": f"{number}", "text": captions}))
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def recipe(pictures: Path, make_recipe: MakeRecipe) -> EncodeRecipe:
    source = {"kind": "table", "path": f"{pictures}/t.jsonl", "root": str(pictures), "media": "{path}"}
    text = {"path": str(save_t5(pictures / "t5", seed=0)), "tokenizer": "bytes", "max_length": 24, "precision": "fp32"}
    changes = {"source": {**source, "key": "key", "caption": "text"}, "transform": {"size": 8}, "text": text}
    return make_recipe(pictures, **changes, batch=3, shard_samples=3)


def embeddings(recipe: EncodeRecipe, name: str) -> list[np.ndarray]:
    return [np.load(io.BytesIO(member)) for member in shard_members(Path(recipe.output), f".{name}.npy")]


def stored(recipe: EncodeRecipe) -> tuple[list[str], list[list[str] | None]]:
    """The .txt of each record, and its captions in the JSON, in the order of the items."""
    texts = [member.decode() for member in shard_members(Path(recipe.output), ".txt")]
    infos = [json.loads(member) for member in shard_members(Path(recipe.output), ".json")]
    order = sorted(range(len(infos)), key=lambda i: infos[i]["source"])
    return [texts[i] for i in order], [infos[i].get("captions") for i in order]


def test_all_captions_are_stored_with_an_embedding_each(recipe: EncodeRecipe) -> None:
    assert "up to 3 captions of an item" in describe(recipe)
    assert encode(recipe, progress=False).exit_code == 0
    assert verify(recipe.output).problems == []
    manifest = read_manifest(recipe.output)
    assert manifest.arrays == ("latent", "text", "text_1", "text_2")
    assert stored(recipe) == (
        [captions[0] for captions in CAPTIONS],
        [captions if len(captions) > 1 else None for captions in CAPTIONS],
    )
    assert recipe.text is not None
    encoder = build_text_encoder(recipe.text)
    firsts = [member.decode() for member in shard_members(Path(recipe.output), ".txt")]
    by_first = {captions[0]: captions for captions in CAPTIONS}
    for number, name in enumerate(TEXT_ARRAYS[:3]):
        texts = [by_first[first][number] for first in firsts if len(by_first[first]) > number]
        for embedding, expected in zip(embeddings(recipe, name), encoder.encode(texts), strict=True):
            np.testing.assert_allclose(embedding, expected, atol=2e-3)
    index = np.load(Path(recipe.output) / INDEX_NAME)
    assert sorted((index["text_2_length"] > 0).tolist()) == [False] * 3 + [True]
    assert not index["text_2_offset"][index["text_2_length"] == 0].any()
    report = stats(recipe.output, progress=False)
    assert (report.counts.captions.total(), report.counts.texts.total()) == (7, 7)
    assert "up to 3 captions of a record" in info(recipe.output)


@pytest.mark.parametrize("rule", ["first", "join"])
def test_one_embedding_of_the_first_or_of_all(recipe: EncodeRecipe, rule: str) -> None:
    recipe = recipe.model_copy(update={"captions": rule})
    encode(recipe, progress=False)
    assert verify(recipe.output).problems == []
    assert read_manifest(recipe.output).arrays == ("latent", "text")
    texts, in_json = stored(recipe)
    assert texts == [" ".join(captions) if rule == "join" else captions[0] for captions in CAPTIONS]
    assert in_json == [captions if len(captions) > 1 else None for captions in CAPTIONS]
    other = recipe.model_copy(update={"captions": "random"})
    with pytest.raises(InputError, match=f"captions is {rule} there and random here"):
        encode(other, progress=False)


def test_items_of_one_caption_have_the_bytes_that_they_had(recipe: EncodeRecipe, pictures: Path) -> None:
    """A list of one, a text, and any rule are the same set."""
    found = []
    for number, (rule, wrap) in enumerate((("random", str), ("random", lambda text: [text]), ("join", str))):
        rows = [{"path": f"{i}.png", "key": f"{i}", "text": wrap(texts[0])} for i, texts in enumerate(CAPTIONS)]
        (pictures / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        output = pictures / f"out-{number}"
        encode(recipe.model_copy(update={"output": str(output), "captions": rule}), progress=False)
        found.append({path.name: path.read_bytes() for path in output.iterdir() if path.suffix in (".tar", ".npy")})
        assert read_manifest(output).arrays == ("latent", "text")
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 3


def test_a_companion_has_all_captions_of_its_dataset(recipe: EncodeRecipe, pictures: Path) -> None:
    latents = recipe.model_copy(update={"text": None})
    encode(latents, progress=False)
    assert read_manifest(latents.output).arrays == ("latent",)
    source = {"kind": "latents", "path": latents.output}
    values = {**recipe.model_dump(), "source": source, "codec": None, "transform": None}
    companion = EncodeRecipe.model_validate(values | {"output": str(pictures / "text"), "shard_samples": 2})
    assert encode(companion, progress=False).exit_code == 0
    assert verify(companion.output).problems == []
    assert read_manifest(companion.output).arrays == ("text", "text_1", "text_2")
    shown = show(companion.output, None, 9, pictures / "none.png")
    assert sorted(line.split("tokens  ")[1] for line in shown.splitlines()) == sorted(
        caption for captions in CAPTIONS for caption in captions
    )


# -- training ----------------------------------------------------------------------------------------------------------


def opened(folder: Path, text: Path | None = None) -> LatentDataset:
    manifest = read_manifest(folder)
    return LatentDataset(folder, manifest, Normalization.of(manifest, "codec"), text=str(text or folder))


def drawn(samples: Samples, records: np.ndarray) -> list[int]:
    """The number of the caption that each sample has; its embedding is that of its record, or the test fails."""
    assert samples.text is not None
    assert samples.text_lengths is not None
    assert samples.text_lengths.tolist() == (1 + records % 3).tolist()
    values = samples.text[:, 0, 0].int().numpy()
    assert (values % 256 == records).all()
    for text, length, value in zip(samples.text, samples.text_lengths.tolist(), values.tolist(), strict=True):
        assert (text[:length] == value).all()
        assert (text[length:] == 0).all()
    return (values // 256).tolist()


def test_a_caption_is_drawn_by_position(tmp_path: Path) -> None:
    write_dataset(tmp_path, [90, 110], text=True, captions=4)
    dataset = opened(tmp_path)
    records = np.arange(200)
    for positions in (records, records + 8100, 10**12 + records):
        counts = 1 + records % 4
        expected = np.floor(keyed_uniforms(3, Stream.CAPTION, positions) * counts).astype(int)
        found = drawn(dataset.read(records, positions, seed=3, flip_probability=0.0), records)
        assert found == expected.tolist()
        for part in (slice(0, 7), slice(7, 8), slice(8, 200)):  # on other ranks, in other micro-batches
            some = dataset.read(records[part], positions[part], seed=3, flip_probability=0.0)
            assert drawn(some, records[part]) == found[part]
    assert found != drawn(dataset.read(records, records, seed=3, flip_probability=0.0), records)
    assert found != drawn(dataset.read(records, positions, seed=4, flip_probability=0.0), records)


def test_captions_are_equally_frequent(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4], text=True, captions=4)
    records = np.full(4000, 3)
    found = drawn(opened(tmp_path).read(records, np.arange(4000), seed=0, flip_probability=0.0), records)
    assert np.bincount(found, minlength=4).min() > 900


def test_captions_of_a_joined_companion(tmp_path: Path) -> None:
    write_dataset(tmp_path / "main", [20, 13], first_record=5)
    write_dataset(tmp_path / "text", [50], text=True, latents=False, captions=3)
    join(tmp_path / "main", tmp_path / "text")
    records = np.arange(33)
    samples = opened(tmp_path / "main", tmp_path / "text").read(records, records, seed=0, flip_probability=0.0)
    found = drawn(samples, records + 5)
    assert found == np.floor(keyed_uniforms(0, Stream.CAPTION, records) * (1 + (records + 5) % 3)).astype(int).tolist()


def test_a_mixture_with_one_and_with_several_captions(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", [16], text=True)
    write_dataset(tmp_path / "several", [16], text=True, captions=3)
    config = DataConfig.model_validate({"mixture": [{"path": str(tmp_path / name)} for name in ("one", "several")]})
    mixture = Mixture.open(config, seed=0, global_batch=8, read_text=True)
    positions = np.arange(16)
    texts = mixture.read(positions).text
    assert texts is not None
    assert (texts[:, 0, 0] >= 256).any()
    again = Mixture.open(config, seed=0, global_batch=8, read_text=True).read(positions[8:]).text
    assert again is not None
    assert torch.equal(again, texts[8:, : again.shape[1]])


def test_a_damaged_caption_is_a_fault_only_where_it_is_drawn(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4], text=True, captions=4)
    row = np.load(tmp_path / INDEX_NAME)[3]
    shard = tmp_path / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[row["text_2_offset"] + row["text_2_length"] - 1] ^= 1
    shard.write_bytes(content)
    dataset, positions = opened(tmp_path), np.arange(40)
    numbers = np.floor(keyed_uniforms(0, Stream.CAPTION, positions) * 4).astype(int)
    good = positions[numbers != 2]
    dataset.read(np.full(len(good), 3), good, seed=0, flip_probability=0.0)
    with pytest.raises(InputError, match=r"c/00003\.text_2\.npy: its checksum is wrong"):
        dataset.read(np.array([3]), positions[numbers == 2][:1], seed=0, flip_probability=0.0)


# -- derived sets ------------------------------------------------------------------------------------------------------


def test_merge_and_split_keep_all_captions(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", [20], text=True)
    write_dataset(tmp_path / "several", [30], text=True, captions=3, first_record=100)
    for order in (("one", "several"), ("several", "one")):
        both = tmp_path / "-".join(order)
        merge([tmp_path / name for name in order], both, progress=False)
        assert verify(both).problems == []
        assert read_manifest(both).arrays == ("latent", "text", "text_1", "text_2")
    parts = {tmp_path / "a": 0.5, tmp_path / "b": 0.5}
    split(both, parts, progress=False)  # type: ignore[arg-type]
    records = []
    for part in parts:
        assert verify(part).problems == []
        dataset = opened(part)
        positions = np.arange(len(dataset))
        samples = dataset.read(positions, positions, seed=0, flip_probability=0.0)
        values = samples.latents[:, 0, 0, 0].int().numpy()
        numbers = drawn(samples, values)
        assert all(number == 0 for number, value in zip(numbers, values.tolist(), strict=True) if value < 100)
        assert max(numbers) == 2
        records += values.tolist()
    assert sorted(records) == [*range(20), *range(100, 130)]


def test_a_lost_caption_is_found(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4], text=True, captions=4)
    shard = tmp_path / "shard-000000.tar"
    content = shard.read_bytes()
    for name, message in (("text_1", r"c/00003\.text_1\.npy: is missing"), ("text_3", "has 3 text embeddings of 4")):
        at = content.index(f"c/00003.{name}.npy".encode())
        size = 512 + -(-int(content[at + 124 : at + 135], 8) // 512) * 512
        shard.write_bytes(content[:at] + content[at + size :])
        assert any(message.replace("\\", "") in problem for problem in verify(tmp_path).problems), name
