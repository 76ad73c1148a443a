from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.check.verify import verify
from data_pipelines.encode.items import ItemTable
from data_pipelines.shards.readers import TarReader, TarRecord, open_shard
from pomscale.base.errors import InputError
from pomscale.config.encode import ImageFolderConfig
from pomscale.shards.index import NO_LABEL
from pomscale.shards.schema import INDEX_NAME, MANIFEST_NAME, REMEDY, read_manifest
from pomscale.sources import build_source
from support.synthetic_dataset import change_manifest, replace_index, write_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_dataset(tmp_path, [3, 4], flip=True)
    assert verify(tmp_path).problems == []
    return tmp_path


def problems_after(dataset: Path, path: Path, content: bytes) -> str:
    before = path.read_bytes()
    path.write_bytes(content)
    report = verify(dataset)
    assert report.exit_code == 1
    assert report.bad_shards == [path.name]
    path.write_bytes(before)
    assert verify(dataset).exit_code == 0
    return "\n".join(report.problems)


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def replace_shard(dataset: Path, number: int, content: bytes, reindex: bool = True) -> None:
    """As if the encoder itself had written another shard; the index follows if `reindex`."""
    manifest = read_manifest(dataset)
    path = dataset / manifest.shards[number].name
    path.write_bytes(content)
    change_manifest(dataset, "shards", number, "num_bytes", value=len(content))
    change_manifest(dataset, "shards", number, "sha256", value=hashlib.sha256(content).hexdigest())
    if reindex:
        index = np.load(dataset / INDEX_NAME)
        rows = []
        with open_shard(path) as stream:
            for record in TarReader(stream):
                rows.append(record.row(number, _label(record), manifest.array_members))
        index[index["shard"] == number] = np.array(rows, index.dtype)
        replace_index(dataset, index)


def _label(record: TarRecord) -> int:
    """Whatever stands there; what is no class is for verify to tell."""
    try:
        return record.label()
    except ValueError:
        return NO_LABEL


def repacked(path: Path, change: dict[str, bytes | None]) -> bytes:
    """The tar with other payloads, or without a member where that is None."""
    stream = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=stream, mode="w:", format=tarfile.USTAR_FORMAT) as new:
        for member in old:
            payload = change.get(member.name, old.extractfile(member).read())  # type: ignore[union-attr]
            if payload is not None:
                member.size = len(payload)
                new.addfile(member, io.BytesIO(payload))
    return stream.getvalue()


@pytest.mark.parametrize(
    "kind",
    [
        {"flip": True},
        {"moments": True},
        {"text": True, "latents": False},
        {"text": True, "flip": True, "shapes": [(4, 2, 3), (4, 3, 2, 2)], "shard_groups": [0, 1]},
    ],
)
def test_one_flipped_bit_anywhere_is_found_and_named_with_its_record(tmp_path: Path, kind: dict[str, Any]) -> None:
    write_dataset(tmp_path, [3, 4], **kind)
    assert verify(tmp_path).problems == []
    path = tmp_path / "shard-000001.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        members = list(tar)
    places = np.random.default_rng(0).integers(0, len(content), 150)
    # The last bytes of a header's sum, of which tar itself ignores one, and of the whole file.
    places = [*places.tolist(), members[3].offset + 154, members[3].offset + 155, len(content) - 1]
    for place in places:
        path.write_bytes(flipped(content, place, place % 8))
        report = verify(tmp_path)
        assert report.exit_code == 1
        assert report.bad_shards == ["shard-000001.tar"]
        text = "\n".join(report.problems)
        inside = [m for m in members if m.offset <= place < m.offset_data + -(-m.size // 512) * 512]
        assert "shard-000001.tar: its sha256 differs from the manifest's" in text
        if inside:
            assert inside[0].name.partition(".")[0] in text, (place, inside[0].name, text)


def test_wrong_arrays_are_named_with_their_field(dataset: Path) -> None:
    shard = dataset / "shard-000001.tar"
    row = np.load(dataset / INDEX_NAME)[4]
    content = shard.read_bytes()
    for member in ("latent", "flip"):
        found = problems_after(dataset, shard, flipped(content, int(row[f"{member}_offset"]) + 130))
        assert f"shard-000001.tar: c/00004: {member}_crc32, record_crc32 differ from index.npy" in found


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 5000, -512])
def test_a_truncated_shard_is_named(dataset: Path, keep: int) -> None:
    shard = dataset / "shard-000000.tar"
    assert "shard-000000.tar: has " in problems_after(dataset, shard, shard.read_bytes()[:keep])


def test_records_behind_a_damaged_header_are_still_read(dataset: Path) -> None:
    shard = dataset / "shard-000001.tar"
    rows = np.load(dataset / INDEX_NAME)[3:]
    content = flipped(shard.read_bytes(), int(rows[1]["flip_offset"]) - 512 + 3)
    found = problems_after(dataset, shard, flipped(content, int(rows[3]["latent_offset"]) + 130))
    assert "shard-000001.tar: c/00004.latent_flip.npy: is missing" in found
    assert "shard-000001.tar: c/00006: latent_crc32, record_crc32 differ from index.npy" in found
    assert "readable records" not in found


def test_missing_and_foreign_shards_are_named(dataset: Path) -> None:
    shard = dataset / "shard-000000.tar"
    content = shard.read_bytes()
    (dataset / "other.tar").write_bytes(content)
    shard.unlink()
    report = verify(dataset)
    assert "shard-000000.tar: is missing" in report.problems
    assert "other.tar: is not in the manifest" in report.problems
    assert report.bad_shards == ["shard-000000.tar"]


def test_shards_that_swapped_places_are_found(dataset: Path) -> None:
    first, second = (dataset / f"shard-00000{i}.tar" for i in range(2))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert any("4 readable records instead of 3" in problem for problem in verify(dataset).problems)


def test_the_index_is_held_against_the_shards(dataset: Path) -> None:
    index = np.load(dataset / INDEX_NAME)
    index["label"][5] += 1
    np.save(dataset / INDEX_NAME, index)
    assert verify(dataset).problems == ["index.npy: its sha256 differs from the manifest's"]
    replace_index(dataset, index)
    assert verify(dataset).problems == ["shard-000001.tar: c/00005: label differ from index.npy"]
    (dataset / INDEX_NAME).write_bytes((dataset / INDEX_NAME).read_bytes()[:-1])
    (problem,) = verify(dataset).problems
    assert problem.startswith("index.npy: has ")
    replace_index(dataset, index[:-1])
    assert verify(dataset).problems == ["index.npy: cannot be read: it is no index of 7 records"]
    index["shard"][0] = 2
    replace_index(dataset, index)
    assert verify(dataset).problems == ["index.npy: names a shard that is not in the manifest"]
    (dataset / INDEX_NAME).unlink()
    report = verify(dataset)
    assert "index.npy: cannot be read" in report.problems[0]
    assert report.bad_shards == []


def test_keys_are_held_against_their_sum(dataset: Path) -> None:
    change_manifest(dataset, "keys_sha256", value="0")
    assert verify(dataset).problems == ["manifest.json: keys_sha256 is not that of index.npy"]


@pytest.mark.parametrize("suffix", [".latent.npy", ".latent_flip.npy", ".text.npy", ".cls", ".txt", ".json"])
def test_members_that_are_missing_are_named(tmp_path: Path, suffix: str) -> None:
    write_dataset(tmp_path, [3], flip=True, text=True)
    shard = tmp_path / "shard-000000.tar"
    replace_shard(tmp_path, 0, repacked(shard, {f"c/00001{suffix}": None}), reindex=False)
    missing = [problem for problem in verify(tmp_path).problems if "is missing" in problem]
    assert missing == [f"shard-000000.tar: c/00001{suffix}: is missing"]


def test_members_that_do_not_belong_there_are_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, [1], text=True)
    change_manifest(tmp_path, "has_captions", value=False)
    change_manifest(tmp_path, "class_names", value=[])
    assert verify(tmp_path).problems == [
        "shard-000000.tar: c/00000.cls: does not belong here",
        "shard-000000.tar: c/00000.txt: does not belong here",
    ]


@pytest.mark.parametrize("name", ["shard-000001.tar", "index.npy"])
def test_bytes_that_cannot_be_read_are_a_problem_not_the_end(dataset: Path, name: str) -> None:
    path = dataset / name
    path.unlink()
    path.symlink_to("/proc/self/mem")  # has no page at 0: reading it is a real input/output error
    with path.open("rb") as stream, pytest.raises(OSError, match=os.strerror(errno.EIO)):
        stream.read(1)
    if name == INDEX_NAME:
        change_manifest(dataset, "index", "num_bytes", value=0)  # so that more than its size is looked at
    (problem,) = verify(dataset).problems
    assert problem == f"{name}: cannot be read: [Errno 5] Input/output error"


def test_the_report_ends_with_the_remedy_once(dataset: Path) -> None:
    for shard in dataset.glob("*.tar"):
        shard.write_bytes(flipped(shard.read_bytes(), 600))
    text = str(verify(dataset))
    assert text.count(REMEDY) == 1
    assert text.endswith(REMEDY)


def test_a_set_that_is_damaged_all_over_is_told_in_a_thousand_lines(tmp_path: Path) -> None:
    write_dataset(tmp_path, [700, 700])
    change_manifest(tmp_path, "groups", 0, "shape", value=[4, 3, 3])
    report = verify(tmp_path)
    assert (len(report.problems), report.num_problems) == (1000, 1400)
    assert "... and 400 more" in str(report)
    assert report.bad_shards == ["shard-000000.tar", "shard-000001.tar"]


def test_classes_that_are_no_classes_are_named(dataset: Path) -> None:
    shard = dataset / "shard-000000.tar"
    for text in (b"x", b"9" * 12, b"5", b"-1"):
        replace_shard(dataset, 0, repacked(shard, {"c/00001.cls": text}), reindex=False)
        (problem, *_) = verify(dataset).problems
        assert problem == f"shard-000000.tar: c/00001: class {text.decode()} is not among the 5 classes"


def test_classes_and_shapes_are_held_against_the_manifest(dataset: Path) -> None:
    change_manifest(dataset, "class_names", value=["a", "b", "c", "d"])
    assert "shard-000001.tar: c/00004: class 4 is not among the 4 classes" in verify(dataset).problems
    change_manifest(dataset, "groups", 0, "shape", value=[4, 2, 2])
    assert "shard-000000.tar: c/00000.latent.npy: is not a float16 array of shape (4, 2, 2)" in verify(dataset).problems


def test_every_group_has_its_shape(tmp_path: Path) -> None:
    write_dataset(tmp_path, [1, 1], moments=True, shapes=[(4, 2, 3), (4, 3, 2, 2)], shard_groups=[0, 1])
    assert verify(tmp_path).problems == []
    change_manifest(tmp_path, "shards", 0, "group", value=1)
    assert verify(tmp_path).problems == [
        "shard-000000.tar: c/00000.latent.npy: is not a float16 array of shape (8, 3, 2, 2)"
    ]


def test_texts_are_held_against_the_manifest(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3], text=True)
    change_manifest(tmp_path, "text", "config", "max_length", value=2)
    assert verify(tmp_path).problems == [
        "shard-000000.tar: c/00002.text.npy: is not a float16 array of shape (1 to 2, 5)"
    ]
    change_manifest(tmp_path, "text", "config", "max_length", value=3)
    for value in ("AAA=", "A"):
        change_manifest(tmp_path, "text", "null_embedding", value=value)
        with pytest.raises(InputError, match=r"manifest\.json: text: "):
            verify(tmp_path)
    change_manifest(tmp_path, "text", "null_embedding", value="AHwAAAAAAAAAAA==")
    assert verify(tmp_path).problems == ["manifest.json: text.null_embedding holds a value that is not finite"]


def test_missing_flips_are_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, [1])
    change_manifest(tmp_path, "latent", "has_flip", value=True)
    assert "shard-000000.tar: c/00000.latent_flip.npy: is missing" in verify(tmp_path).problems


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("array", ["latent", "text"])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float, array: str) -> None:
    write_dataset(tmp_path, [1], text=True)
    content = (tmp_path / "shard-000000.tar").read_bytes()
    last = int(sum(np.load(tmp_path / INDEX_NAME)[0][[f"{array}_offset", f"{array}_length"]]))
    replace_shard(tmp_path, 0, content[: last - 2] + np.float16(value).tobytes() + content[last:])
    assert verify(tmp_path).problems == [f"shard-000000.tar: c/00000.{array}.npy: holds a value that is not finite"]


def test_a_key_in_two_shards_is_named(dataset: Path) -> None:
    manifest = json.loads((dataset / MANIFEST_NAME).read_text())
    manifest["shards"][1] |= {key: manifest["shards"][0][key] for key in ("num_samples", "num_bytes", "sha256")}
    manifest["num_samples"] = 6
    (dataset / MANIFEST_NAME).write_text(json.dumps(manifest))
    (dataset / "shard-000001.tar").write_bytes((dataset / "shard-000000.tar").read_bytes())
    assert "shard-000001.tar: c/00000: is also a key of shard-000000.tar" in verify(dataset).problems


def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3, 1, 4], text=True, shapes=[(4, 2, 3), (4, 3, 2)], shard_groups=[0, 0, 1])
    for name in ("shard-000000.tar", "shard-000002.tar"):
        path = tmp_path / name
        path.write_bytes(flipped(path.read_bytes(), 512 + 140))
    alone, together = verify(tmp_path, num_workers=1), verify(tmp_path, num_workers=2)
    assert alone == together
    assert alone.bad_shards == ["shard-000000.tar", "shard-000002.tar"]
    assert verify(tmp_path, only=["shard-000001.tar"]).problems == []


def write_item_table(pictures: Path, dataset: Path) -> ItemTable:
    """The list of items that an encode keeps, of empty files that have the keys of the synthetic dataset."""
    (pictures / "c").mkdir(parents=True)
    for item in range(40):
        (pictures / "c" / f"{item:05d}.png").touch()
    table = ItemTable.build(build_source(ImageFolderConfig(kind="image_folder", path=str(pictures))), dataset / "parts")
    change_manifest(dataset, "source", value={"fingerprint": table.fingerprint, "num_items": len(table)})
    return table


def test_every_item_of_the_source_is_a_record_or_a_failure(tmp_path: Path) -> None:
    dataset = tmp_path / "latents"
    write_dataset(dataset, [6, 4])
    write_item_table(tmp_path / "pictures", dataset)
    report = verify(dataset)
    assert report.problems[0] == "manifest.json: 10 samples and 0 failures are not the 40 items of the source"
    named = [line for line in report.problems if "is neither in a shard nor in failures.jsonl" in line]
    assert len(named) == 20
    assert set(named) < {
        f"c/{item:05d}: is neither in a shard nor in failures.jsonl (c/{item:05d}.png)" for item in range(10, 40)
    }
    assert report.problems[-1] == "10 more items are neither in a shard nor in failures.jsonl"
    assert report.num_problems == 31

    failures = [json.dumps({"key": f"c/{item:05d}", "path": "x", "reason": "y"}) + "\n" for item in range(10, 40)]
    (dataset / "failures.jsonl").write_text("".join(failures))
    change_manifest(dataset, "num_failures", value=30)
    assert verify(dataset).problems == []
    (dataset / "failures.jsonl").write_text("".join(failures[1:]))
    assert verify(dataset).problems == [
        "failures.jsonl: lists 29 failures, the manifest 30",
        "c/00010: is neither in a shard nor in failures.jsonl (c/00010.png)",
    ]
    (dataset / "failures.jsonl").write_text(failures[0] + "{\n")
    assert any(line.startswith("failures.jsonl: line 2 cannot be read") for line in verify(dataset).problems)


def test_a_damaged_list_of_items_hides_no_other_damage(tmp_path: Path) -> None:
    dataset = tmp_path / "latents"
    write_dataset(dataset, [20, 20])
    write_item_table(tmp_path / "pictures", dataset)
    (dataset / "parts" / "keys.npy").write_bytes(b"")
    (dataset / "shard-000001.tar").unlink()
    problems = verify(dataset).problems
    assert "shard-000001.tar: is missing" in problems
    assert re.search(r"items\.json: the list of items cannot be read: keys\.npy", problems[-1])


def test_an_unfinished_dataset_is_refused(dataset: Path) -> None:
    (dataset / MANIFEST_NAME).unlink()
    with pytest.raises(InputError, match="is the encode finished"):
        verify(dataset)
