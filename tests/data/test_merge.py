from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.check.repair import repair
from data_pipelines.check.verify import verify
from data_pipelines.derive.merge import merge
from data_pipelines.shards.equal_keys import equal_keys, sorted_buckets
from data_pipelines.shards.statistics import ChannelStatistics
from pomscale.base.errors import InputError, PomscaleError
from pomscale.shards.index import key_hash
from pomscale.shards.schema import INDEX_NAME, read_manifest
from support.synthetic_dataset import change_manifest, write_dataset

A, B = (4, 2, 3), (4, 3, 2, 2)


def keys_of(folder: Path) -> list[int]:
    return np.load(folder / INDEX_NAME)["key"].tolist()


def hashes(*records: int) -> list[int]:
    return [key_hash(f"c/{record:05d}") for record in records]


def test_groups_of_equal_shape_become_one_and_every_record_is_there(tmp_path: Path) -> None:
    one = write_dataset(tmp_path / "one", [2, 3], text=True, flip=True, shapes=[A, B], shard_groups=[0, 1])
    write_dataset(tmp_path / "two", [4, 1], text=True, flip=True, shapes=[B, A], shard_groups=[0, 1], first_record=50)
    report = merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both", progress=False)
    assert (report.num_samples, report.num_shards, report.num_copied) == (10, 4, 0)
    manifest = read_manifest(tmp_path / "both")
    assert [group.shape for group in manifest.groups] == [A, B]
    assert [shard.group for shard in manifest.shards] == [0, 0, 1, 1]
    assert keys_of(tmp_path / "both") == hashes(0, 1, 54, 2, 3, 4, 50, 51, 52, 53)
    assert verify(tmp_path / "both").problems == []
    # Linked, not copied.
    assert (tmp_path / "both" / "shard-000002.tar").samefile(tmp_path / "one" / "shard-000001.tar")
    assert manifest.recipe["kind"] == "merge"
    assert manifest.recipe["of"][0] == {"path": str((tmp_path / "one").resolve()), "fingerprint": one.fingerprint}


def test_statistics_failures_and_sources_are_added_up(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, (4, 30))
    for name, mine, first in (("one", values[:, :10], 0), ("two", values[:, 10:], 50)):
        folder = tmp_path / name
        write_dataset(folder, [1], first_record=first)
        for key, value in (
            ("mean", mine.mean(1).tolist()),
            ("std", mine.std(1).tolist()),
            ("num_values", mine.shape[1]),
        ):
            change_manifest(folder, "latent", key, value=value)
        (folder / "failures.jsonl").write_text(json.dumps({"key": name, "path": "x", "reason": "y"}) + "\n")
        change_manifest(folder, "num_failures", value=1)
        change_manifest(folder, "source", "num_items", value=2)
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both", progress=False)
    manifest = read_manifest(tmp_path / "both")
    np.testing.assert_allclose(manifest.latents.mean, values.mean(1), rtol=1e-12)
    np.testing.assert_allclose(manifest.latents.std, values.std(1), rtol=1e-12)
    assert (manifest.latents.num_values, manifest.num_failures, manifest.source.num_items) == (30, 2, 4)
    lines = (tmp_path / "both" / "failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["one", "two"]
    assert verify(tmp_path / "both").problems == []


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        (("codec", "identity"), "y", "codec identity"),
        (("codec", "config", "block"), 4, "codec"),
        (("transform", "filter"), "area", "transform"),
        (("text", "config", "max_length"), 7, "text encoder"),
        (("text_version",), 2, "text_version"),
    ],
)
def test_sets_that_were_made_differently_are_refused(
    tmp_path: Path, place: tuple[str, ...], value: Any, what: str
) -> None:
    write_dataset(tmp_path / "one", [2], text=True)
    write_dataset(tmp_path / "two", [2], text=True, first_record=50)
    change_manifest(tmp_path / "two", *place, value=value)
    with pytest.raises(InputError, match=f"merge: {what} of .*one is .* but that of .*two is"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both", progress=False)
    assert not (tmp_path / "both").exists()


def test_where_weights_lay_and_which_buckets_there_are_may_differ(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", [2], text=True)
    write_dataset(tmp_path / "two", [2], text=True, first_record=50)
    change_manifest(tmp_path / "two", "text", "config", "path", value="/elsewhere")
    change_manifest(tmp_path / "two", "transform", value={"buckets": [[4, 4], [4, 8]]})
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both", progress=False)
    transform = read_manifest(tmp_path / "both").transform
    assert transform is not None
    assert transform.targets == [(4, 4), (4, 8)]


def test_a_key_in_two_sets_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", [5])
    write_dataset(tmp_path / "two", [5], first_record=4)
    with pytest.raises(InputError, match=r"merge: c/00004 is a key of .*one and of .*two; keys must be unique"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both", progress=False)


def test_damage_is_not_merged_away(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", [2])
    write_dataset(tmp_path / "two", [2], first_record=50)
    index = tmp_path / "two" / INDEX_NAME
    index.write_bytes(index.read_bytes()[:-1] + b"\1")
    with pytest.raises(PomscaleError, match=r"two/index.npy: its sha256 differs"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both", progress=False)
    write_dataset(tmp_path / "two", [2], first_record=50)
    shard = tmp_path / "two" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both", progress=False)
    assert verify(tmp_path / "both").bad_shards == ["shard-000001.tar"]


def test_a_killed_merge_may_be_run_again_and_nothing_else_is_overwritten(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", [2, 2])
    write_dataset(tmp_path / "two", [2], first_record=50)
    folders = [tmp_path / "one", tmp_path / "two"]
    (tmp_path / "two" / "shard-000000.tar").rename(tmp_path / "away")
    with pytest.raises(PomscaleError, match=r"two/shard-000000.tar: cannot be linked"):
        merge(folders, tmp_path / "both", progress=False)
    assert (tmp_path / "both" / "shard-000001.tar").exists()
    with pytest.raises(InputError, match="both: is not empty"):
        merge(folders[::-1], tmp_path / "both", progress=False)
    (tmp_path / "away").rename(tmp_path / "two" / "shard-000000.tar")
    merge(folders, tmp_path / "both", progress=False)
    assert verify(tmp_path / "both").problems == []
    with pytest.raises(InputError, match="both: is not empty"):
        merge(folders, tmp_path / "both", progress=False)
    with pytest.raises(InputError, match=r"made by `pomscale data merge`.*repair .*one, .*two and do it again"):
        repair(tmp_path / "both", progress=False)


def test_merged_statistics_do_not_depend_on_how_they_are_grouped() -> None:
    one, two = (ChannelStatistics(count=n, mean=(float(n),), squares=(2.0 * n,)) for n in (3, 5))
    assert one.merge(two).count == 8
    np.testing.assert_allclose(one.merge(two).mean, two.merge(one).mean, rtol=1e-15)


@pytest.mark.parametrize("rows_at_once", [1, 7, 64, 10_000])
def test_keys_are_sorted_on_disk_as_in_memory(rows_at_once: int) -> None:
    rng = np.random.default_rng(0)
    columns = [rng.integers(0, 2**64, n, dtype=np.uint64, endpoint=False) for n in (300, 0, 100)]
    columns[2][:5] = columns[0][:5]
    buckets = list(sorted_buckets(columns, rows_at_once))
    for number, column in enumerate(columns):
        found = np.concatenate([bucket[number] for bucket in buckets])
        order = np.argsort(column, kind="stable")
        np.testing.assert_array_equal(found["row"], order)
        np.testing.assert_array_equal(found["key"], column[order])
    shared = [set(bucket[0]["key"]) & set(bucket[2]["key"]) for bucket in buckets]
    assert sum(map(len, shared)) == 5
    if rows_at_once < 300:
        assert max(sum(map(len, bucket)) for bucket in buckets) < len(columns[0])


def test_equal_keys_are_paired_in_order() -> None:
    assert list(equal_keys(np.array([7, 3, 7, 1, 7], np.uint64))) == [(0, 2), (2, 4)]
