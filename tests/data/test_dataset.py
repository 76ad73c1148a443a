from __future__ import annotations

import resource
import zlib
from pathlib import Path

import numpy as np
import pytest
from synthetic_dataset import LATENT_SHAPE, replace_index, write_dataset

from pomscale.data.dataset import LatentDataset
from pomscale.data.index import INDEX_DTYPE
from pomscale.data.schema import INDEX_NAME
from pomscale.errors import InputError


def read(dataset: LatentDataset, records: list[int], flip: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.array(records)
    return dataset.read(numbers, 1000 + numbers, seed=3, flip_probability=flip)


def test_records_come_normalised_with_their_labels(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3, 4])
    latents, labels = read(LatentDataset.open(tmp_path, "dataset"), [6, 0, 2])
    assert latents.dtype == np.float32
    assert labels.tolist() == [1, 0, 2]
    expected = np.array([6, 0, 2])[:, None] / np.array([1, 2, 4, 8])
    np.testing.assert_array_equal(latents, np.broadcast_to(expected[..., None, None], (3, *LATENT_SHAPE)))


def test_flips_are_keyed_by_position_and_as_frequent_as_asked(tmp_path: Path) -> None:
    write_dataset(tmp_path, [500], flip=True)
    dataset = LatentDataset.open(tmp_path, "codec")
    records = list(range(500))
    assert (read(dataset, records, 1.0)[0][:, 0, 0, 0] == -np.arange(500) - 1).all()
    some = read(dataset, records, 0.3)[0]
    assert 0.2 < (some[:, 0, 0, 0] < 0).mean() < 0.4
    np.testing.assert_array_equal(read(dataset, records[100:110], 0.3)[0], some[100:110])


def test_moments_are_sampled_by_position(tmp_path: Path) -> None:
    write_dataset(tmp_path, [64], moments=True)
    dataset = LatentDataset.open(tmp_path, "codec")
    latents, _ = read(dataset, list(range(64)))
    assert latents.shape == (64, *LATENT_SHAPE)
    noise = latents - np.arange(64)[:, None, None, None]
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1.0) < 0.1
    np.testing.assert_array_equal(read(dataset, [9, 5])[0], latents[[9, 5]])


def corrupt(path: Path, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)


def test_damage_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3, 4])
    row = np.load(tmp_path / INDEX_NAME)[5]
    offset, length = int(row["latent_offset"]), int(row["latent_length"])
    shard = tmp_path / "shard-000001.tar"
    whole = shard.read_bytes()

    corrupt(shard, offset + length - 1, bytes([whole[offset + length - 1] ^ 1]))
    message = r"shard-000001\.tar: record 5, c/00005\.latent\.npy: its checksum is wrong.*pomscale data verify"
    with pytest.raises(InputError, match=message):
        read(LatentDataset.open(tmp_path, "codec"), [4, 5])
    read(LatentDataset.open(tmp_path, "codec"), [0, 4, 6])

    shard.write_bytes(whole)
    corrupt(shard, offset, b"junk")
    with pytest.raises(InputError, match=r"record 5.*not a float16 array"):
        read(LatentDataset.open(tmp_path, "codec"), [5])

    shard.write_bytes(whole[:-600])
    with pytest.raises(InputError, match=r"shard-000001\.tar: has .* bytes, but the manifest says"):
        read(LatentDataset.open(tmp_path, "codec"), [5])
    shard.write_bytes(b"")
    with pytest.raises(InputError, match=r"shard-000001\.tar: cannot be read"):
        read(LatentDataset.open(tmp_path, "codec"), [5])
    shard.unlink()
    with pytest.raises(InputError, match=r"shard-000001\.tar: cannot be read"):
        read(LatentDataset.open(tmp_path, "codec"), [5])


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3])
    index = np.load(tmp_path / INDEX_NAME)
    offset, length = int(index[1]["latent_offset"]), int(index[1]["latent_length"])
    corrupt(tmp_path / "shard-000000.tar", offset + length - 2, np.float16(np.nan).tobytes())
    payload = (tmp_path / "shard-000000.tar").read_bytes()[offset : offset + length]
    index["latent_crc32"][1] = zlib.crc32(payload)
    replace_index(tmp_path, index)
    with pytest.raises(InputError, match=r"record 1, .*not finite"):
        read(LatentDataset.open(tmp_path, "codec"), [1])


def test_an_index_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3])
    whole = (tmp_path / INDEX_NAME).read_bytes()
    for content in (b"no index", b"", whole[:-1], whole + b"x", whole.replace(b"'fortran_order'", b"'((((((((((((('")):
        (tmp_path / INDEX_NAME).write_bytes(content)
        with pytest.raises(InputError, match=r"index\.npy: cannot be read.*delete the named shards and run the same"):
            LatentDataset.open(tmp_path, "codec")
    replace_index(tmp_path, np.zeros(2, INDEX_DTYPE))
    with pytest.raises(InputError, match=r"index\.npy: cannot be read: it is no index of 3 records"):
        LatentDataset.open(tmp_path, "codec")
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(InputError, match=r"index\.npy: cannot be read"):
        LatentDataset.open(tmp_path, "codec")


@pytest.mark.parametrize(("field", "value"), [("label", 5), ("label", -1), ("shard", 1), ("shard", -1)])
def test_index_rows_of_no_shard_or_class_are_refused(tmp_path: Path, field: str, value: int) -> None:
    write_dataset(tmp_path, [3])
    index = np.load(tmp_path / INDEX_NAME)
    index[field][1] = value
    replace_index(tmp_path, index)
    with pytest.raises(InputError, match=rf"index\.npy: record 1: .*{field if field == 'shard' else 'class'} {value}"):
        read(LatentDataset.open(tmp_path, "codec"), [0, 1])
    read(LatentDataset.open(tmp_path, "codec"), [0, 2])


def test_two_datasets_of_many_shards_fit_a_process(tmp_path: Path) -> None:
    write_dataset(tmp_path, [1] * 600)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        datasets = [LatentDataset.open(tmp_path, "codec") for _ in range(2)]
        for dataset in datasets:
            latents, labels = read(dataset, list(range(600)))
            assert len(latents) == len(labels) == 600
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
