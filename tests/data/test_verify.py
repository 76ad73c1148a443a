from __future__ import annotations

import errno
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from synthetic_dataset import change_manifest, replace_index, write_dataset

from data_pipelines.common.verify import verify
from pomscale.data.schema import INDEX_NAME, MANIFEST_NAME, REMEDY
from pomscale.errors import InputError


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
    path.write_bytes(before)
    assert verify(dataset).exit_code == 0
    return "\n".join(report.problems)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_one_bit_is_found_and_named(dataset: Path) -> None:
    shard = dataset / "shard-000001.tar"
    row = np.load(dataset / INDEX_NAME)[4]
    content = shard.read_bytes()
    for member in ("latent", "flip"):
        found = problems_after(dataset, shard, flipped(content, int(row[f"{member}_offset"]) + 130))
        assert "shard-000001.tar: its sha256 differs" in found
        assert f"shard-000001.tar: c/00004: {member}_crc32 differ from index.npy" in found
    found = problems_after(dataset, shard, flipped(content, int(row["latent_offset"]) - 500))
    assert "shard-000001.tar: its sha256 differs" in found


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 5000, -512])
def test_a_truncated_shard_is_named(dataset: Path, keep: int) -> None:
    shard = dataset / "shard-000000.tar"
    assert "shard-000000.tar: has " in problems_after(dataset, shard, shard.read_bytes()[:keep])


def test_missing_and_foreign_shards_are_named(dataset: Path) -> None:
    shard = dataset / "shard-000000.tar"
    content = shard.read_bytes()
    (dataset / "other.tar").write_bytes(content)
    shard.unlink()
    found = "\n".join(verify(dataset).problems)
    assert "shard-000000.tar: is missing" in found
    assert "other.tar: is not in the manifest" in found


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
    (dataset / INDEX_NAME).unlink()
    assert "index.npy: cannot be read" in verify(dataset).problems[0]


def test_members_that_are_missing_are_named(dataset: Path) -> None:
    shard = dataset / "shard-000000.tar"
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member)) for member in tar]
        payloads = [(member, stream.read()) for member, stream in members if stream]
    suffixes = (".latent.npy", ".latent_flip.npy", ".cls", ".json")
    for suffix in suffixes:
        with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for member, payload in payloads:
                if member.name != f"c/00001{suffix}":
                    tar.addfile(member, io.BytesIO(payload))
        content = shard.read_bytes()
        change_manifest(dataset, "shards", 0, "num_bytes", value=len(content))
        change_manifest(dataset, "shards", 0, "sha256", value=hashlib.sha256(content).hexdigest())
        missing = [problem for problem in verify(dataset).problems if "is missing" in problem]
        assert missing == [f"shard-000000.tar: c/00001{suffix}: is missing"]


@pytest.mark.parametrize("name", ["shard-000001.tar", "index.npy"])
def test_bytes_that_cannot_be_read_are_a_problem_not_the_end(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = hashlib.file_digest

    def failing(stream: BinaryIO, digest: str) -> object:
        if Path(stream.name).name == name:
            raise OSError(errno.EIO, "Input/output error")
        return real(stream, digest)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", failing)
    (problem,) = verify(dataset).problems
    assert problem == f"{name}: cannot be read: [Errno 5] Input/output error"


def test_the_report_ends_with_the_remedy_once(dataset: Path) -> None:
    for shard in dataset.glob("*.tar"):
        shard.write_bytes(flipped(shard.read_bytes(), 600))
    text = str(verify(dataset))
    assert text.count(REMEDY) == 1
    assert text.endswith(REMEDY)


def test_classes_that_are_no_numbers_are_named(dataset: Path) -> None:
    shard = dataset / "shard-000000.tar"
    content = shard.read_bytes()
    for text in (b"x", b"9" * 12):
        with shard.open("wb") as stream, tarfile.open(fileobj=stream, mode="w:") as tar:
            member = tarfile.TarInfo("c/00000.cls")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
        assert any("shard-000000.tar: cannot be read" in problem for problem in verify(dataset).problems)
    shard.write_bytes(content)


def test_classes_shapes_and_flips_are_held_against_the_manifest(dataset: Path) -> None:
    change_manifest(dataset, "class_names", value=["a", "b", "c", "d"])
    assert "shard-000001.tar: c/00004: class 4 is not among the 4 classes" in verify(dataset).problems
    change_manifest(dataset, "latent", "shape", value=[4, 2, 2])
    assert "shard-000000.tar: c/00000.latent.npy: is not a float16 array of shape (4, 2, 2)" in verify(dataset).problems


def test_missing_flips_are_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, [1])
    change_manifest(tmp_path, "transform", "flip", value=True)
    assert verify(tmp_path).problems == ["shard-000000.tar: c/00000.latent_flip.npy: is missing"]


def test_values_that_are_not_finite_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "full", lambda shape, _, dtype: np.ones(shape, dtype) * np.float16(np.inf))
    write_dataset(tmp_path, [1])
    assert verify(tmp_path).problems == ["shard-000000.tar: c/00000.latent.npy: holds a value that is not finite"]


def test_a_key_in_two_shards_is_named(dataset: Path) -> None:
    manifest = json.loads((dataset / MANIFEST_NAME).read_text())
    manifest["shards"][1] |= {key: manifest["shards"][0][key] for key in ("num_samples", "num_bytes", "sha256")}
    manifest["num_samples"] = 6
    (dataset / MANIFEST_NAME).write_text(json.dumps(manifest))
    (dataset / "shard-000001.tar").write_bytes((dataset / "shard-000000.tar").read_bytes())
    assert "shard-000001.tar: c/00000: is also a key of shard-000000.tar" in verify(dataset).problems


def test_an_unfinished_dataset_is_refused(dataset: Path) -> None:
    (dataset / MANIFEST_NAME).unlink()
    with pytest.raises(InputError, match="is the encode finished"):
        verify(dataset)
