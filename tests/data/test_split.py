from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.check.verify import verify
from data_pipelines.derive.split import split
from data_pipelines.inspect.stats import stats
from pomscale.base.errors import InputError, PomscaleError
from pomscale.shards.schema import INDEX_NAME, read_manifest
from support.synthetic_dataset import change_manifest, replace_index, write_dataset

A, B = (4, 2, 3), (4, 3, 2, 2)


def members_of(folder: Path) -> dict[str, bytes]:
    members = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                members[member.name] = stream.read()
    return members


@pytest.mark.parametrize(
    "kind",
    [
        {"flip": True},
        {"moments": True, "flip": True},
        {"text": True, "latents": False},
        {"text": True, "shapes": [A, B], "shard_groups": [0, 0, 0, 1, 1]},
    ],
)
def test_parts_are_disjoint_and_complete_and_datasets_of_their_own(tmp_path: Path, kind: dict[str, Any]) -> None:
    whole = write_dataset(tmp_path / "whole", [40, 40, 20, 40, 30], **kind)
    outputs = {tmp_path / "train": 0.8, tmp_path / "heldout": 0.2}
    report = split(tmp_path / "whole", outputs, progress=False)
    train, heldout = members_of(tmp_path / "train"), members_of(tmp_path / "heldout")
    assert not train.keys() & heldout.keys()
    assert train | heldout == members_of(tmp_path / "whole")
    for folder, part in zip(outputs, report.parts, strict=True):
        manifest = read_manifest(folder)
        assert verify(folder).problems == []
        assert stats(folder, progress=False).exit_code == 0
        assert manifest.num_samples == part.num_samples == len(np.load(folder / INDEX_NAME))
        assert manifest.groups == whole.groups
        assert manifest.recipe["of"] == [{"path": str(tmp_path / "whole"), "fingerprint": whole.fingerprint}]
        if whole.latent:
            labels = np.load(folder / INDEX_NAME)["label"]
            assert part.class_counts == tuple(np.bincount(labels, minlength=5).tolist())
        # No crumbs: a shard is full before the next one begins.
        sizes = [[s.num_samples for s in manifest.shards if s.group == group] for group in range(len(manifest.groups))]
        assert all(size == 40 for mine in sizes for size in mine[:-1])
    assert 0.7 < report.parts[0].num_samples / 170 < 0.9
    assert "samples per class" in str(report) or not whole.latent


def test_a_record_stays_where_it_is_when_the_dataset_grows(tmp_path: Path) -> None:
    for name, sizes in (("small", [30]), ("large", [50, 60])):
        write_dataset(tmp_path / name, sizes)
        split(tmp_path / name, {tmp_path / f"{name}-a": 0.5, tmp_path / f"{name}-b": 0.5}, seed=3, progress=False)
    for part in "ab":
        small, large = (set(np.load(tmp_path / f"{name}-{part}" / INDEX_NAME)["key"]) for name in ("small", "large"))
        assert small
        assert small < large
    split(tmp_path / "small", {tmp_path / "a": 0.5, tmp_path / "b": 0.5}, seed=4, progress=False)
    assert set(np.load(tmp_path / "a" / INDEX_NAME)["key"]) != set(np.load(tmp_path / "small-a" / INDEX_NAME)["key"])


def test_failures_are_dealt_too(tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    write_dataset(folder, [20])
    lines = [json.dumps({"key": f"f/{i}", "path": "x", "reason": "y"}) + "\n" for i in range(30)]
    (folder / "failures.jsonl").write_text("".join(lines))
    change_manifest(folder, "num_failures", value=30)
    change_manifest(folder, "source", "num_items", value=50)
    split(folder, {tmp_path / "a": 0.5, tmp_path / "b": 0.5}, progress=False)
    dealt = [(tmp_path / part / "failures.jsonl").read_text().splitlines(keepends=True) for part in "ab"]
    assert sorted(dealt[0] + dealt[1]) == sorted(lines)
    for part in "ab":
        assert verify(tmp_path / part).problems == []


@pytest.mark.parametrize("line", [b"{\n", b"\xff\n", b'{"path": "x"}\n', b"[]\n"])
def test_a_damaged_list_of_failures_is_told(tmp_path: Path, line: bytes) -> None:
    write_dataset(tmp_path / "whole", [20])
    change_manifest(tmp_path / "whole", "num_failures", value=2)
    (tmp_path / "whole" / "failures.jsonl").write_bytes(b'{"key": "f"}\n' + line)
    with pytest.raises(PomscaleError, match=r"whole/failures\.jsonl: line 2 cannot be read.*pomscale data repair"):
        split(tmp_path / "whole", {tmp_path / "a": 0.5, tmp_path / "b": 0.5}, progress=False)


def test_processes_write_what_one_writes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "whole", [10, 10, 10], flip=True)
    for name, num_workers in (("alone", 1), ("together", 2)):
        outputs = {tmp_path / name / "a": 0.7, tmp_path / name / "b": 0.3}
        split(tmp_path / "whole", outputs, num_workers=num_workers, progress=False)
    for path in (tmp_path / "alone").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "together" / path.relative_to(tmp_path / "alone")).read_bytes()


def test_damage_is_not_copied(tmp_path: Path) -> None:
    write_dataset(tmp_path / "whole", [10, 10])
    shard = tmp_path / "whole" / "shard-000001.tar"
    whole = shard.read_bytes()
    row = np.load(tmp_path / "whole" / INDEX_NAME)[14]
    for place in (int(row["latent_offset"]) + 130, int(row["latent_offset"]) - 500, int(row["latent_offset"]) + 512):
        content = bytearray(whole)
        content[place] ^= 1
        shard.write_bytes(content)
        with pytest.raises(PomscaleError, match=r"shard-000001.tar: .* is not as the index says: damaged"):
            split(tmp_path / "whole", {tmp_path / "a": 0.5, tmp_path / "b": 0.5}, progress=False)
    shard.write_bytes(whole)
    # What the failed runs left is taken up again.
    split(tmp_path / "whole", {tmp_path / "a": 0.5, tmp_path / "b": 0.5}, progress=False)
    assert verify(tmp_path / "a").problems == []
    index = np.load(tmp_path / "whole" / INDEX_NAME)
    index["label"][3] += 1
    replace_index(tmp_path / "whole", index)
    with pytest.raises(PomscaleError, match=r"shard-000000.tar: c/00003 is not as the index says"):
        split(tmp_path / "whole", {tmp_path / "c": 0.5, tmp_path / "d": 0.5}, progress=False)


@pytest.mark.parametrize("shares", [{"a": 1.0}, {"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}, {"a": 0.5, "./a": 0.5}])
def test_shares_that_are_none_are_refused(tmp_path: Path, shares: dict[str, float]) -> None:
    write_dataset(tmp_path / "whole", [10])
    with pytest.raises(InputError, match="split: "):
        split(tmp_path / "whole", {f"{tmp_path}/{name}": share for name, share in shares.items()}, progress=False)


def test_a_part_without_samples_and_a_folder_with_something_in_it_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "whole", [10])
    with pytest.raises(InputError, match="b would get none of the 10 samples"):
        split(tmp_path / "whole", {tmp_path / "a": 1 - 1e-9, tmp_path / "b": 1e-9}, progress=False)
    assert not (tmp_path / "a").exists()
    with pytest.raises(InputError, match="whole: is not empty"):
        split(tmp_path / "whole", {tmp_path / "a": 0.5, tmp_path / "whole": 0.5}, progress=False)
    assert not list((tmp_path / "a").glob("*.tar"))
