"""The loader's features are those of the very picture that it returns: shuffled, mirrored, mixed, resumed, joined."""

from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.derive.join import join
from data_pipelines.derive.merge import merge
from pomscale.base.errors import InputError
from pomscale.config.data import DataConfig
from pomscale.data.dataset import Samples
from pomscale.data.loader import Loader, MicroBatch, ReadAhead
from pomscale.data.mixture import Mixture
from support.feature_sets import encode_features, encode_pixels, features_of, write_grey

GLOBAL_BATCH = 8


def open_mixture(until: int | None = None, **settings: Any) -> Mixture:
    config = DataConfig.model_validate({"shuffle_window": 16, **settings})
    return Mixture.open(config, seed=3, global_batch=GLOBAL_BATCH, read_text=False, features_until=until)


def batches(mixture: Mixture, count: int, start: int = 0) -> list[MicroBatch]:
    """Return the first micro-batches of 3 or 4 from a step on."""
    ahead = ReadAhead(num_threads=2, prefetch=2)
    with Loader(
        mixture,
        micro_batch=4,
        rank=0,
        world_size=1,
        start_position=start * GLOBAL_BATCH,
        ahead=ahead,
        finish=lambda batch: batch,
    ) as loader:
        return list(itertools.islice(loader, count))


def assert_fits(batch: MicroBatch | Samples) -> None:
    """Assert that the features are those of these pictures, mirrored or not, and of no others."""
    assert batch.features is not None
    assert batch.features.dtype == torch.float16
    torch.testing.assert_close(batch.features, features_of(batch.latents), rtol=2e-3, atol=1e-3)


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """24 pictures, and their features in the same order."""
    source = write_grey(tmp_path / "in", 24)
    encode_pixels(source, tmp_path / "pixels")
    encode_features(source, tmp_path / "features")
    return tmp_path


def named(root: Path, pixels: str = "pixels", features: str = "features") -> dict[str, str]:
    return {"path": str(root / pixels), "features": str(root / features)}


@pytest.mark.parametrize("way", ["mapped", "streamed", "cache"])
def test_each_picture_has_its_features_mirrored_or_not(sets: Path, way: str) -> None:
    settings: dict[str, Any] = {"cache": {"path": str(sets / "cache")}} if way == "cache" else {"reading": way}
    if way == "cache":
        settings["reading"] = "mapped"
    mixture = open_mixture(**named(sets), **settings)
    found = batches(mixture, 12)
    for batch in found:
        assert_fits(batch)
        assert batch.features is not None
        assert batch.features.shape == (4, 16, 64)
    resumed = batches(mixture, 4, start=4)
    for again, batch in zip(resumed, found[8:], strict=True):
        assert torch.equal(again.positions, batch.positions)
        assert again.features is not None
        assert batch.features is not None
        assert torch.equal(again.features, batch.features)
    never = open_mixture(**named(sets), flip_probability=0)
    flipped = [not torch.equal(a.latents, b.latents) for a, b in zip(found, batches(never, 12), strict=True)]
    assert any(flipped)
    mixture.close()


def test_features_are_read_only_if_asked_for(sets: Path) -> None:
    (batch,) = batches(open_mixture(path=str(sets / "pixels")), 1)
    assert batch.features is None


@pytest.mark.parametrize("reading", ["mapped", "streamed"])
def test_features_are_read_until_alignment_ends(sets: Path, reading: str) -> None:
    settings: dict[str, Any] = {"until": 2 * GLOBAL_BATCH + 1, "reading": reading, **named(sets)}
    with closing(open_mixture(**settings)) as mixture:
        for batch in batches(mixture, 5):  # the last has one sample before the end, and all its features
            assert_fits(batch)
        expected = batches(mixture, 2, start=3)
    for shard in (sets / "features").glob("*.tar"):
        shard.unlink()
    with closing(open_mixture(**settings)) as mixture:
        found = batches(mixture, 2, start=3)  # what is not read is not missed
        for batch, with_shards in zip(found, expected, strict=True):
            assert batch.features is not None
            assert batch.features.shape == (4, 16, 64)
            assert not batch.features.any()
            assert torch.equal(batch.latents, with_shards.latents)
        with pytest.raises(InputError, match="features"):
            batches(mixture, 1, start=2)


def test_a_mixture_has_the_features_of_its_sets(sets: Path) -> None:
    more = write_grey(sets / "more", 10, seed=1)
    encode_pixels(more, sets / "pixels2")
    encode_features(more, sets / "features2")
    components = [{**named(sets), "weight": 2}, named(sets, "pixels2", "features2")]
    mixture = open_mixture(mixture=components)
    for batch in batches(mixture, 10):
        assert_fits(batch)
    assert mixture.features is not None
    assert mixture.features.info.grid == (4, 4)


def test_sets_in_another_order_are_joined_by_key(sets: Path) -> None:
    """The companion has more records than the pictures, in an order of its own."""
    encode_features(write_grey(sets / "in", 30), sets / "all", seed=5, shard_samples=7)
    with pytest.raises(InputError, match="run `pomscale data join"):
        open_mixture(**named(sets, features="all"))
    assert join(sets / "pixels", sets / "all").num_missing == 0
    mixture = open_mixture(**named(sets, features="all"))
    for batch in batches(mixture, 8):
        assert_fits(batch)
    dataset = mixture.datasets[0]
    assert dataset.num_bytes([0]) > dataset.manifest.shards[0].num_bytes
    mixture.check_indexes()


def test_a_picture_without_features_is_a_bad_sample(sets: Path) -> None:
    encode_pixels(write_grey(sets / "in", 28), sets / "more")
    assert join(sets / "more", sets / "features").num_missing == 4
    settings = named(sets, "more")
    with pytest.raises(InputError, match=r"it has no features of a teacher in \S+features, or the sets have changed"):
        batches(open_mixture(**settings), 7)
    found = batches(open_mixture(**settings, bad_samples="skip"), 7)
    bad = [sample for batch in found for sample in batch.bad]
    assert len({sample.key for sample in bad}) == 4
    for batch in found:
        assert batch.features is not None
        good = batch.weights > 0
        torch.testing.assert_close(batch.features[good], features_of(batch.latents[good]), rtol=2e-3, atol=1e-3)
        assert not batch.features[~good].any()
        assert not batch.latents[~good].any()


def test_damaged_features_are_a_bad_sample(sets: Path) -> None:
    shard = sets / "features" / "shard-000002.tar"
    content = bytearray(shard.read_bytes())
    for name in (b".features.npy", b".feat_flip.npy"):
        content[content.index(name) + 2000] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"shard-000002\.tar: record 10, .*features.*checksum is wrong"):
        batches(open_mixture(**named(sets)), 6)
    found = batches(open_mixture(**named(sets), bad_samples="skip"), 6)
    assert sum(len(batch.bad) for batch in found) == 1


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"transform": {"size": 8, "filter": "area", "flip": True}}, {}, r"another transform \(filter area\).*lanczos"),
        ({"transform": {"size": 8}}, {}, r"no features of mirrored pictures.*transform\.flip: true"),
        ({"codec": {"name": "uint8", "channels": 1}}, {}, r"has no features of a teacher; encode them"),
    ],
)
def test_features_of_other_pictures_are_refused(
    sets: Path, changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    encode_features(sets / "in", sets / "other", **changes)
    with pytest.raises(InputError, match=message):
        open_mixture(**named(sets, features="other"), **settings)


def test_features_without_flips_serve_pictures_that_are_not_mirrored(sets: Path) -> None:
    encode_features(sets / "in", sets / "plain", transform={"size": 8})
    mixture = open_mixture(**named(sets, features="plain"), flip_probability=0)
    for batch in batches(mixture, 6):
        assert_fits(batch)
    with pytest.raises(InputError, match="has no features of mirrored pictures"):
        mixture.datasets[0].read(torch.arange(8).numpy(), torch.arange(8).numpy(), seed=0, flip_probability=1.0)


def test_features_of_another_size_are_refused(sets: Path) -> None:
    encode_pixels(sets / "in", sets / "large", transform={"size": 16, "flip": True})
    with pytest.raises(InputError, match=r"features are of another transform \(size \[\(8, 8\)\]\) than \S+large"):
        open_mixture(**named(sets, "large"))


def test_features_alone_are_nothing_to_train_on(sets: Path) -> None:
    with pytest.raises(InputError, match="has features and no latents; name the dataset that has the latents"):
        open_mixture(path=str(sets / "features"))


def test_a_mixture_of_two_grids_is_refused(sets: Path) -> None:
    encode_features(sets / "in", sets / "coarse", features={"teacher": "digits", "grid": [2, 2]})
    with pytest.raises(InputError, match=r"their grids are \(4, 4\) and \(2, 2\)\. Encode one of them again"):
        open_mixture(mixture=[named(sets), named(sets, features="coarse")])
    with pytest.raises(ValueError, match="give `features` for all components, or for none"):
        open_mixture(mixture=[named(sets), {"path": str(sets / "pixels")}])
    with pytest.raises(ValueError, match="features: belongs to `path`; a mixture names `features` per component"):
        open_mixture(mixture=[named(sets)], features=str(sets / "features"))


def test_merged_pictures_have_merged_features(sets: Path) -> None:
    more = write_grey(sets / "more", 10, seed=1)
    encode_pixels(more, sets / "pixels2")
    encode_features(more, sets / "features2")
    for name in ("pixels", "features"):
        merge([sets / name, sets / f"{name}2"], sets / f"{name}-all", progress=False)
    for batch in batches(open_mixture(**named(sets, "pixels-all", "features-all")), 8):
        assert_fits(batch)
