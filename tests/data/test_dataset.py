from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.data import CacheConfig
from pomscale.data.dataset import LatentDataset, Samples
from pomscale.data.normalize import normalize
from pomscale.shards.index import index_dtype
from pomscale.shards.join import join_path, open_join
from pomscale.shards.schema import INDEX_NAME, ArrayName, Normalization, read_manifest
from support.damage import HEADER_BYTES, change_row, fix_checksum, flip_bit, overwrite
from support.synthetic_dataset import LATENT_SHAPE, TEXT_DIM, change_manifest, replace_index, write_dataset


def read(dataset: LatentDataset, records: list[int], flip: float = 0.0) -> Samples:
    numbers = np.array(records)
    return dataset.read(numbers, 1000 + numbers, seed=3, flip_probability=flip)


def open_skipping(folder: Path, text: str | None = None) -> LatentDataset:
    manifest = read_manifest(folder)
    normalization = Normalization.of(manifest, "codec")
    return LatentDataset(folder, manifest, normalization, text=text, bad_samples="skip")


def open_with_text(folder: Path, text: Path) -> LatentDataset:
    manifest = read_manifest(folder)
    return LatentDataset(folder, manifest, Normalization.of(manifest, "codec"), text=str(text))


def values(latents: torch.Tensor) -> list[int]:
    """What the synthetic latents, the same everywhere, are."""
    flat = latents.flatten(1)
    assert (flat == flat[:, :1]).all()
    return flat[:, 0].int().tolist()


def test_records_come_as_they_are_stored_with_their_labels(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3, 4])
    dataset = LatentDataset.open(tmp_path, "dataset")
    samples = read(dataset, [6, 0, 2])
    assert samples.latents.dtype == torch.float16
    assert values(samples.latents) == [6, 0, 2]
    assert samples.labels.tolist() == [1, 0, 2]
    assert samples.text is None
    assert not samples.bad
    expected = torch.tensor([6.0, 0.0, 2.0])[:, None] / torch.tensor([1.0, 2.0, 4.0, 8.0])
    normalised = normalize(samples.latents, dataset.normalization)
    assert normalised.dtype == torch.float32
    assert normalised.equal(expected[..., None, None].expand(3, *LATENT_SHAPE))


def test_a_batch_has_the_shape_of_its_group(tmp_path: Path) -> None:
    clip = (4, 3, 2, 2)
    write_dataset(tmp_path, [3, 4, 2], shapes=[LATENT_SHAPE, clip], shard_groups=[0, 0, 1])
    dataset = LatentDataset.open(tmp_path, "codec")
    assert read(dataset, [6, 0]).latents.shape == (2, *LATENT_SHAPE)
    assert read(dataset, [8, 7]).latents.shape == (2, *clip)
    assert values(read(dataset, [8, 7]).latents) == [8, 7]


def test_flips_are_keyed_by_position_and_as_frequent_as_asked(tmp_path: Path) -> None:
    write_dataset(tmp_path, [500], flip=True)
    dataset = LatentDataset.open(tmp_path, "codec")
    records = list(range(500))
    assert values(read(dataset, records, 1.0).latents) == [-r - 1 for r in records]
    some = read(dataset, records, 0.3).latents
    assert 0.2 < (some[:, 0, 0, 0] < 0).float().mean() < 0.4
    assert read(dataset, records[100:110], 0.3).latents.equal(some[100:110])


def test_moments_are_sampled_by_position(tmp_path: Path) -> None:
    write_dataset(tmp_path, [64], moments=True)
    dataset = LatentDataset.open(tmp_path, "codec")
    latents = read(dataset, list(range(64))).latents
    assert latents.shape == (64, *LATENT_SHAPE)
    noise = latents - torch.arange(64.0)[:, None, None, None]
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1.0) < 0.1
    assert read(dataset, [9, 5]).latents.equal(latents[[9, 5]])


def test_a_set_without_classes_has_no_labels(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3])
    change_manifest(tmp_path, "class_names", value=[])
    index = np.load(tmp_path / INDEX_NAME)
    index["label"] = -1
    replace_index(tmp_path, index)
    assert read(LatentDataset.open(tmp_path, "codec"), [2, 1]).labels.tolist() == [-1, -1]


def assert_embeddings(samples: Samples, records: list[int]) -> None:
    """The synthetic embedding of record r is r, in 1 + r % 3 rows."""
    assert samples.text is not None
    assert samples.text_lengths is not None
    assert samples.text.dtype == torch.float16
    lengths = [1 + record % 3 for record in records]
    assert samples.text_lengths.tolist() == lengths
    assert samples.text.shape == (len(records), max(lengths), TEXT_DIM)
    for text, record, length in zip(samples.text, records, lengths, strict=True):
        assert (text[:length] == record).all()
        assert (text[length:] == 0).all()


def test_texts_of_the_same_shards_are_padded_to_the_longest(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3, 4], text=True)
    dataset = open_with_text(tmp_path, tmp_path)
    for records in ([0, 3], [6, 0, 2], [4]):
        samples = read(dataset, records)
        assert values(samples.latents) == records
        assert_embeddings(samples, records)


def test_a_companion_with_the_same_keys_is_joined_by_row(tmp_path: Path) -> None:
    write_dataset(tmp_path / "main", [3, 4])
    write_dataset(tmp_path / "text", [5, 2], text=True, latents=False)
    assert_embeddings(read(open_with_text(tmp_path / "main", tmp_path / "text"), [6, 0, 2]), [6, 0, 2])


def test_a_companion_with_other_keys_is_joined_by_its_table(tmp_path: Path) -> None:
    main = write_dataset(tmp_path / "main", [3, 4])
    # Has texts of the records 2 to 9.
    companion = write_dataset(tmp_path / "text", [5, 3], text=True, latents=False, first_record=2)
    with pytest.raises(
        InputError, match=r"join-[0-9a-f]{12}\.npy: cannot be read.*`pomscale data join \S+main \S+text`"
    ):
        open_with_text(tmp_path / "main", tmp_path / "text")
    table = np.array([-1, -1, 0, 1, 2, 3, 4])
    path = join_path(tmp_path / "text", main)
    np.save(path, table)
    dataset = open_with_text(tmp_path / "main", tmp_path / "text")
    assert_embeddings(read(dataset, [6, 2, 5]), [6, 2, 5])
    with pytest.raises(InputError, match=r"record 1, c/00001\.latent\.npy: it has no text embedding in \S+text, or"):
        read(dataset, [2, 1])
    assert isinstance(open_join("main", main, str(tmp_path / "text"), companion), np.memmap)

    np.save(path, table[[0, 1, 3, 2, 4, 5, 6]])  # left from when the companion had another order
    stale = open_skipping(tmp_path / "main", text=str(tmp_path / "text"))
    samples = read(stale, [2, 3, 4])
    assert sorted(samples.bad) == [0, 1]
    assert "pomscale data join" in samples.bad[0].reason
    assert samples.text_lengths is not None
    assert samples.text_lengths.tolist() == [1, 1, 2]  # the null embedding has one row

    for wrong in (table[:-1], table.astype(np.int32), table.reshape(1, -1)):
        np.save(path, wrong)
        with pytest.raises(InputError, match=r"no table of 7 rows.*pomscale data join"):
            open_with_text(tmp_path / "main", tmp_path / "text")
    np.save(path, table)
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole.replace(b"fortran", b"('(((((")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"join-[0-9a-f]{12}\.npy: cannot be read.*pomscale data join"):
            open_with_text(tmp_path / "main", tmp_path / "text")


def test_a_set_without_texts_is_no_companion(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3])
    with pytest.raises(InputError, match="has no text embeddings"):
        open_with_text(tmp_path, tmp_path)


def test_damage_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3, 4])
    shard = tmp_path / "shard-000001.tar"
    whole = shard.read_bytes()

    flip_bit(tmp_path, 5)
    message = r"shard-000001\.tar: record 5, c/00005\.latent\.npy: its checksum is wrong.*pomscale data verify"
    with pytest.raises(InputError, match=message):
        read(LatentDataset.open(tmp_path, "codec"), [4, 5])
    read(LatentDataset.open(tmp_path, "codec"), [0, 4, 6])

    shard.write_bytes(whole[:-600])
    with pytest.raises(InputError, match=r"shard-000001\.tar: has .* bytes, but the manifest says"):
        read(LatentDataset.open(tmp_path, "codec"), [5])
    shard.write_bytes(b"")
    with pytest.raises(InputError, match=r"shard-000001\.tar: has 0 bytes, but the manifest says"):
        read(LatentDataset.open(tmp_path, "codec"), [5])
    shard.unlink()
    with pytest.raises(InputError, match=r"shard-000001\.tar: cannot be read"):
        read(LatentDataset.open(tmp_path, "codec"), [5])


def test_members_that_are_whole_and_wrong_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, [8], text=True)
    nan = np.float16(np.nan).tobytes()
    overwrite(tmp_path, 1, -2, nan)
    overwrite(tmp_path, 2, 0, b"junk")
    overwrite(tmp_path, 3, HEADER_BYTES, nan, array="text")
    overwrite(tmp_path, 4, 0, b"junk", array="text")
    for record, array in ((1, "latent"), (2, "latent"), (3, "text"), (4, "text")):
        fix_checksum(tmp_path, record, array=array)
    index = np.load(tmp_path / INDEX_NAME)
    index["latent_length"][5] -= 2
    index["latent_offset"][6] = 10**9
    replace_index(tmp_path, index)
    fix_checksum(tmp_path, 5)
    dataset = open_skipping(tmp_path, text=str(tmp_path))
    samples = read(dataset, list(range(8)))
    reasons = {row: sample.reason for row, sample in samples.bad.items()}
    assert reasons.keys() == {1, 2, 3, 4, 5, 6}
    assert "record 1, c/00001.latent.npy: it holds a value that is not finite" in reasons[1]
    assert "record 2, c/00002.latent.npy: it is not a float16 array of shape (4, 2, 3)" in reasons[2]
    assert "record 3, c/00003.text.npy: it holds a value that is not finite" in reasons[3]
    assert "record 4, c/00004.text.npy: it is not a float16 array of shape (1 to 120, 5)" in reasons[4]
    assert "record 5, c/00005.latent.npy: it is not a float16 array" in reasons[5]
    assert "record 6, key #" in reasons[6]
    assert "bytes at 1,000,000,000 are not in the shard" in reasons[6]


def test_bad_samples_can_be_skipped(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3, 4, 2], text=True, flip=True)
    flip_bit(tmp_path, 1)
    flip_bit(tmp_path, 5, array="text")
    (tmp_path / "shard-000002.tar").unlink()
    index = np.load(tmp_path / INDEX_NAME)
    index["label"][4] = 9
    replace_index(tmp_path, index)
    records = [0, 1, 4, 5, 6, 7, 8]
    samples = read(open_skipping(tmp_path, text=str(tmp_path)), records)
    bad = {records[row]: sample for row, sample in samples.bad.items()}
    keys = {record: sample.key for record, sample in bad.items()}
    assert (keys[1], keys[5]) == ("c/00001", "c/00005")
    assert all(keys[record].startswith("#") for record in (4, 7, 8))
    assert all(sample.record == record for record, sample in bad.items())
    assert bad.keys() == {1, 4, 5, 7, 8}
    assert {sample.location for sample in bad.values()} == {str(tmp_path)}
    assert "no class 9" in bad[4].reason
    assert "shard-000002.tar: cannot be read" in bad[7].reason
    assert values(samples.latents) == [0, 0, 0, 0, 6, 0, 0]
    assert samples.labels.tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert samples.text is not None
    assert samples.text_lengths is not None
    assert samples.text_lengths.tolist() == [1] * 7
    assert samples.text[:, 0, 0].tolist() == [0, -1, -1, -1, 6, -1, -1]


def test_an_index_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3])
    whole = (tmp_path / INDEX_NAME).read_bytes()
    for content in (b"no index", b"", whole[:-1], whole + b"x", whole.replace(b"'fortran_order'", b"'((((((((((((('")):
        (tmp_path / INDEX_NAME).write_bytes(content)
        with pytest.raises(InputError, match=r"index\.npy: cannot be read.*pomscale data verify.*pomscale data repair"):
            LatentDataset.open(tmp_path, "codec")
    replace_index(tmp_path, np.zeros(2, index_dtype(["latent"])))
    with pytest.raises(InputError, match=r"index\.npy: cannot be read: it is no index of 3 records"):
        LatentDataset.open(tmp_path, "codec")
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(InputError, match=r"index\.npy"):
        LatentDataset.open(tmp_path, "codec")


@pytest.mark.parametrize(("field", "value"), [("label", 5), ("label", -1), ("shard", 1), ("shard", -1)])
def test_index_rows_of_no_shard_or_class_are_refused(tmp_path: Path, field: str, value: int) -> None:
    write_dataset(tmp_path, [3])
    change_row(tmp_path, 1, field, value)
    with pytest.raises(InputError, match=rf"index\.npy: record 1: .*{field if field == 'shard' else 'class'} {value}"):
        read(LatentDataset.open(tmp_path, "codec"), [0, 1])
    read(LatentDataset.open(tmp_path, "codec"), [0, 2])


@contextmanager
def limit_of_open_files(number: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("is_cached", [False, True])
def test_shards_in_use_need_no_descriptors(tmp_path: Path, is_cached: bool) -> None:
    manifest = write_dataset(tmp_path / "set", [1] * 600)
    cache = CacheConfig(path=str(tmp_path / "cache")) if is_cached else None
    normalization = Normalization.of(manifest, "codec")
    with limit_of_open_files(len(os.listdir("/proc/self/fd")) + 20):
        datasets = [LatentDataset(tmp_path / "set", manifest, normalization, cache=cache) for _ in range(3)]
        for dataset in datasets:
            with closing(dataset):
                dataset.will_need(range(600), 0)
                assert values(read(dataset, list(range(600))).latents) == list(range(600))


@pytest.mark.parametrize("is_cached", [False, True])
def test_limits_of_the_machine_are_no_bad_samples(tmp_path: Path, is_cached: bool) -> None:
    manifest = write_dataset(tmp_path / "set", [3, 4])
    cache = CacheConfig(path=str(tmp_path / "cache")) if is_cached else None
    normalization = Normalization.of(manifest, "codec")
    with closing(LatentDataset(tmp_path / "set", manifest, normalization, cache=cache, bad_samples="skip")) as dataset:
        with limit_of_open_files(3), pytest.raises(PomscaleError, match=r"shard-000000\.tar.*ulimit -n") as raised:
            read(dataset, [0])
        assert not isinstance(raised.value, InputError)
        assert values(read(dataset, [0, 5]).latents) == [0, 5]


@pytest.mark.parametrize("array", ["latent", "text"])
def test_a_damaged_copy_in_the_cache_is_replaced(tmp_path: Path, array: ArrayName) -> None:
    folder, cache = tmp_path / "set", CacheConfig(path=str(tmp_path / "cache"))
    manifest = write_dataset(folder, [8], text=True)

    def opened() -> LatentDataset:
        normalization = Normalization.of(manifest, "codec")
        return LatentDataset(folder, manifest, normalization, text=str(folder), cache=cache)

    with closing(opened()) as dataset:
        read(dataset, [0])
    (copy,) = (tmp_path / "cache").rglob("*.tar")
    whole = copy.read_bytes()
    flip_bit(folder, 2, array=array)
    flip_bit(folder, 5, array=array)
    damaged = (folder / copy.name).read_bytes()
    (folder / copy.name).write_bytes(whole)
    copy.write_bytes(damaged)
    with closing(opened()) as dataset:
        samples = read(dataset, list(range(8)))
        assert values(samples.latents) == list(range(8))
        assert_embeddings(samples, list(range(8)))
    assert copy.read_bytes() == whole

    copy.write_bytes(damaged)
    (folder / copy.name).write_bytes(damaged)
    with closing(opened()) as dataset:
        for _ in range(2):
            with pytest.raises(InputError, match=rf"{folder}/shard-000000\.tar: its sha256 is not the manifest's"):
                read(dataset, [2])


def test_the_first_fault_of_a_sample_is_told(tmp_path: Path) -> None:
    write_dataset(tmp_path / "main", [3])
    write_dataset(tmp_path / "text", [3], text=True, latents=False)
    flip_bit(tmp_path / "main", 1)
    index = np.load(tmp_path / "text" / INDEX_NAME)
    index["label"][:2] = 3
    replace_index(tmp_path / "text", index)
    bad = read(open_skipping(tmp_path / "main", text=str(tmp_path / "text")), [0, 1, 2]).bad
    assert "no class 3" in bad[0].reason
    assert "its checksum is wrong" in bad[1].reason
    assert bad.keys() == {0, 1}
