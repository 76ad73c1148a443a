from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from pomscale.base.errors import InputError
from pomscale.config.data import DataConfig
from pomscale.data.interleave import PERIOD, Interleave
from pomscale.data.mixture import Mixture
from pomscale.data.mixture_order import MixtureOrder
from pomscale.shards.index import index_dtype, to_npy
from pomscale.shards.schema import Manifest, Normalization
from support.synthetic_dataset import LATENT_SHAPE, TEXT_DIM, change_manifest, write_dataset

WIDE, CLIP = (4, 3, 2), (4, 2, 2, 2)
GLOBAL_BATCH = 8
SEED = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in two buckets, clips with some pictures, and a few pictures: all shapes in more than one dataset."""
    root = tmp_path_factory.mktemp("mixture")
    write_dataset(root / "pictures", [60, 9, 40, 8], shapes=[LATENT_SHAPE, WIDE], shard_groups=[0, 0, 1, 1])
    write_dataset(root / "clips", [60, 30, 5], shapes=[CLIP, WIDE], shard_groups=[0, 0, 1], first_record=1000)
    write_dataset(root / "more", [5, 6], first_record=2000)
    return root


def config(root: Path, **weights: float) -> DataConfig:
    components = [{"path": str(root / name), "weight": weight} for name, weight in weights.items()]
    return DataConfig.model_validate({"mixture": components, "shuffle_window": 32})


def open_mixture(data: DataConfig, read_text: bool = False) -> Mixture:
    return Mixture.open(data, seed=SEED, global_batch=GLOBAL_BATCH, read_text=read_text)


def in_order(order: MixtureOrder, start: int, stop: int) -> list[tuple[int, int]]:
    """Component and record at each position; asked for in one go."""
    found: dict[int, tuple[int, int]] = {}
    for part in order.parts(np.arange(start, stop)):
        rows = zip(part.rows.tolist(), part.records.tolist(), strict=True)
        found |= {row: (part.component, record) for row, record in rows}
    return [found[row] for row in range(stop - start)]


def test_the_order_is_that_of_counting_one_by_one(root: Path) -> None:
    """Against a walk from the first sample, which counts what each lane and component has given so far."""
    mixture = open_mixture(config(root, pictures=2, clips=1, more=0.5))
    order, num_steps = mixture.order, 300
    components = order.components
    assert [(c.dataset, c.shape) for c in components] == [
        (0, LATENT_SHAPE), (0, WIDE), (1, CLIP), (1, WIDE), (2, LATENT_SHAPE),
    ]  # fmt: skip
    of_dataset = [Fraction(4, 7), Fraction(2, 7), Fraction(1, 7)]
    of_records = [Fraction(69, 117), Fraction(48, 117), Fraction(90, 95), Fraction(5, 95), 1]
    weights = [of_dataset[c.dataset] * share for c, share in zip(components, of_records, strict=True)]
    assert [c.share for c in components] == weights
    lanes = [[0, 4], [1, 3], [2]]

    steps = Interleave([sum((weights[c] for c in lane), Fraction(0)) for lane in lanes], SEED, 0)
    lane_of = steps.locate(np.arange(num_steps))[0]
    inside = [Interleave([weights[c] for c in lane], SEED, 1 + i) for i, lane in enumerate(lanes)]
    given_by_lane, given_by_component = [0] * 3, [0] * 5
    expected = []
    for lane in lane_of.tolist():
        for _ in range(GLOBAL_BATCH):
            stream = int(inside[lane].locate(np.array([given_by_lane[lane]]))[0][0])
            component = lanes[lane][stream]
            index = given_by_component[component]
            record = components[component].first_record + components[component].order.records(np.array([index]))[0]
            expected.append((component, int(record)))
            given_by_lane[lane] += 1
            given_by_component[component] += 1
    assert in_order(order, 0, num_steps * GLOBAL_BATCH) == expected
    for samples in (0, GLOBAL_BATCH, 1000, 1003, num_steps * GLOBAL_BATCH):
        seen = Counter(component for component, _ in expected[:samples])
        assert order.counts(samples) == [seen[component] for component in range(5)]


def test_shares_are_exact_however_long_the_run(root: Path) -> None:
    mixture = open_mixture(config(root, pictures=2, clips=1, more=0.5))
    shares = [component.share for component in mixture.order.components]
    for num_steps in (1_000, 12_345, PERIOD, 10**9):
        num_samples = num_steps * GLOBAL_BATCH
        for count, share in zip(mixture.order.counts(num_samples), shares, strict=True):
            # Lanes are exact to about a step, components in them to about a sample.
            assert abs(count - share * num_samples) <= 5 * GLOBAL_BATCH
    epochs = {name: epochs.mean for name, epochs in mixture.epochs(10**12).items()}
    expected = {"pictures": 4 / 7 / 117, "clips": 2 / 7 / 95, "more": 1 / 7 / 11}
    assert epochs == pytest.approx({name: share * 10**12 for name, share in expected.items()})


def test_equal_buckets_have_equal_epochs(tmp_path: Path) -> None:
    write_dataset(tmp_path, [320, 320, 8], shapes=[LATENT_SHAPE, WIDE, CLIP], shard_groups=[0, 1, 2])
    mixture = open_mixture(DataConfig(path=str(tmp_path)))
    ((name, epochs),) = mixture.epochs(640).items()
    assert epochs.mean == pytest.approx(640 / 648)
    first, second, third = mixture.order.counts(640)
    assert abs(first - second) <= 2 * GLOBAL_BATCH
    assert (epochs.lowest, epochs.highest) == (min(first / 320, third / 8), max(second / 320, first / 320, third / 8))
    # A step is the least that the shape of 8 records can be given.
    assert third in (0, GLOBAL_BATCH, 2 * GLOBAL_BATCH)
    late = mixture.epochs(64_800 * GLOBAL_BATCH)[name]
    assert (late.lowest, late.highest) == pytest.approx((late.mean, late.mean), rel=1e-2)


def test_components_are_not_shuffled_alike(tmp_path: Path) -> None:
    write_dataset(tmp_path, [32])
    mixture = open_mixture(DataConfig.model_validate({"mixture": [{"path": str(tmp_path)}, {"path": str(tmp_path)}]}))
    assert mixture.names == [f"0-{tmp_path.name}", f"1-{tmp_path.name}"]
    first: list[list[int]] = [[], []]
    for component, record in in_order(mixture.order, 0, 128):
        first[component].append(record)
    assert sorted(first[0][:32]) == sorted(first[1][:32])
    assert first[0][:32] != first[1][:32]


def test_what_is_announced_is_what_is_read(root: Path) -> None:
    mixture = open_mixture(config(root, pictures=2, clips=1, more=0.5))
    for start in (*range(0, 800, GLOBAL_BATCH), 6 * 10**12):
        num_steps = 1 + start // GLOBAL_BATCH % 20
        newest = start + (num_steps - 1) * GLOBAL_BATCH
        ahead = mixture.order.shards_ahead(start, newest)
        for part in mixture.order.parts(np.arange(start, newest + GLOBAL_BATCH)):
            dataset = mixture.order.components[part.component].dataset
            sizes = [shard.num_samples for shard in mixture.datasets[dataset].manifest.shards]
            shards = np.searchsorted(np.cumsum(sizes), part.records, side="right")
            assert set(shards.tolist()) <= set(ahead[dataset])


def test_a_batch_of_several_datasets_is_put_together(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 1000)):
        write_dataset(tmp_path / name, [30], text=True, first_record=first)
    write_dataset(tmp_path / "texts", [30], text=True, latents=False, first_record=1000)
    components = [{"path": str(tmp_path / "a")}, {"path": str(tmp_path / "b"), "text": str(tmp_path / "texts")}]
    mixture = open_mixture(DataConfig.model_validate({"mixture": components}), read_text=True)
    samples = mixture.read(np.arange(GLOBAL_BATCH))
    expected = [1000 * component + record for component, record in in_order(mixture.order, 0, GLOBAL_BATCH)]
    assert len({record // 1000 for record in expected}) == 2
    assert samples.latents[:, 0, 0, 0].int().tolist() == expected
    assert samples.labels.tolist() == [record % 5 for record in expected]
    assert samples.text is not None
    assert samples.text_lengths is not None
    assert samples.text_lengths.tolist() == [1 + record % 3 for record in expected]
    assert samples.text.shape[2] == TEXT_DIM
    for text, record in zip(samples.text, expected, strict=True):
        rows = 1 + record % 3
        assert (text[:rows] == record).all()
        assert (text[rows:] == 0).all()


def test_bad_samples_of_a_mixture_keep_their_rows(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 1000)):
        write_dataset(tmp_path / name, [8], first_record=first)
    (tmp_path / "b" / "shard-000000.tar").unlink()
    components = [{"path": str(tmp_path / name)} for name in "ab"]
    mixture = open_mixture(DataConfig.model_validate({"mixture": components, "bad_samples": "skip"}))
    samples = mixture.read(np.arange(GLOBAL_BATCH))
    where = in_order(mixture.order, 0, GLOBAL_BATCH)
    assert sorted(samples.bad) == [row for row, (component, _) in enumerate(where) if component == 1]
    assert [samples.bad[row].record for row in sorted(samples.bad)] == [record for c, record in where if c == 1]
    assert samples.latents[sorted(samples.bad)].equal(torch.zeros(len(samples.bad), *LATENT_SHAPE))


@pytest.fixture
def manifests(tmp_path: Path) -> list[Manifest]:
    return [write_dataset(tmp_path / name, [4]) for name in "ab"]


def with_moments(manifest: Manifest, mean: float, std: float) -> Manifest:
    latent = manifest.latents.model_copy(update={"mean": (mean,) * 4, "std": (std,) * 4})
    return manifest.model_copy(update={"latent": latent})


def test_one_normalisation_for_all(manifests: list[Manifest]) -> None:
    codec = Normalization.of_mixture(manifests, [1.0, 3.0], "codec")
    assert codec == Normalization.of(manifests[0], "codec")
    scaled = manifests[1].latent_codec.model_copy(update={"scaling_factor": 0.5})
    with pytest.raises(InputError, match=r"scale latents differently .*0\.5"):
        Normalization.of_mixture([manifests[0], manifests[1].model_copy(update={"codec": scaled})], [1, 1], "codec")

    values = np.random.default_rng(0).normal([[1.0], [-2.0]], [[0.5], [2.0]], (2, 200_000))
    parts = [with_moments(m, v.mean(), v.std()) for m, v in zip(manifests, values, strict=True)]
    pooled = Normalization.of_mixture(parts, [1.0, 3.0], "dataset")
    drawn = np.concatenate([values[0], *[values[1]] * 3])
    assert pooled.mean == pytest.approx((drawn.mean(),) * 4)
    assert pooled.std == pytest.approx((drawn.std(),) * 4)
    assert Normalization.of_mixture(parts[:1], [1.0], "dataset") == Normalization.of(parts[0], "dataset")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("codec", "identity"), "other", "their codecs differ in weights"),
        (("latent", "mean"), [0.0] * 3, "their latents have 4 and 3 channels"),
    ],
)
def test_datasets_that_do_not_belong_together_are_refused(
    manifests: list[Manifest], tmp_path: Path, keys: tuple[str, ...], value: object, message: str
) -> None:
    change_manifest(tmp_path / "b", *keys, value=value)
    with pytest.raises(InputError, match=rf"data\.mixture: \S+a and \S+b: {message}"):
        open_mixture(config(tmp_path, a=1, b=1))


def test_clips_of_different_speeds_are_refused(tmp_path: Path) -> None:
    for name in ("pictures", "a", "b"):
        write_dataset(tmp_path / name, [4])
    for name, fps in (("a", 8.0), ("b", 8.0)):
        change_manifest(tmp_path / name, "transform", value={"kind": "video", "fps": fps})
    assert open_mixture(config(tmp_path, pictures=1, a=1, b=1)).fps == 8
    assert open_mixture(config(tmp_path, pictures=1)).fps is None
    change_manifest(tmp_path / "b", "transform", "fps", value=16.0)
    with pytest.raises(InputError, match=r"\S+a and \S+b: their clips have 8 and 16 frames per second"):
        open_mixture(config(tmp_path, pictures=1, a=1, b=1))


def test_classes_may_differ_where_captions_are_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_dataset(tmp_path / name, [4], text=True)
    change_manifest(tmp_path / "b", "class_names", value=list("vwxyz"))
    with pytest.raises(InputError, match="its classes are not those of"):
        open_mixture(config(tmp_path, a=1, b=1))
    mixture = open_mixture(config(tmp_path, a=1, b=1), read_text=True)
    assert mixture.read(np.arange(4)).text is not None


def test_texts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "texts"):
        write_dataset(tmp_path / name, [4], text=True, latents=name != "texts")
    components = [{"path": str(tmp_path / "a")}, {"path": str(tmp_path / "b"), "text": str(tmp_path / "texts")}]
    data = DataConfig.model_validate({"mixture": components})
    open_mixture(data, read_text=True)
    for key, value, message in (
        ("identity", "other", "their text encoders differ in weights"),
        ("dim", 1, rf"their embeddings have {TEXT_DIM} and 1 values per token"),
        ("config.max_length", 150, "of their captions up to 120 and 150 tokens were kept"),
    ):
        write_dataset(tmp_path / "texts", [4], text=True, latents=False)
        if key == "dim":
            change_manifest(tmp_path / "texts", "text", "null_length", value=TEXT_DIM)
        change_manifest(tmp_path / "texts", "text", *key.split("."), value=value)
        with pytest.raises(InputError, match=rf"the texts in \S+a and \S+texts: {message}"):
            open_mixture(data, read_text=True)
    components[1] = {"path": str(tmp_path / "texts")}
    with pytest.raises(InputError, match=r"dataset \S+texts: has text embeddings and no latents"):
        open_mixture(DataConfig.model_validate({"mixture": components}), read_text=True)


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [4])
    index = to_npy(np.empty(0, index_dtype(write_dataset(tmp_path / "b", [4]).arrays)))
    (tmp_path / "b" / "index.npy").write_bytes(index)
    for keys, value in ((["shards"], []), (["num_samples"], 0), (["index", "num_bytes"], len(index))):
        change_manifest(tmp_path / "b", *keys, value=value)
    with pytest.raises(InputError, match=r"dataset \S+b: has no records"):
        open_mixture(config(tmp_path, a=1, b=1))


def test_what_two_windows_take_must_fit(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "data", [8, 8])
    data = {"path": str(tmp_path / "data"), "cache": {"path": str(tmp_path / "cache")}, "shuffle_window": 8}
    largest = max(shard.num_bytes for shard in manifest.shards) / 2**30
    too_small = DataConfig.model_validate(data | {"cache": data["cache"] | {"max_gib": 1.5 * largest}})
    with pytest.raises(InputError, match=r"shuffle_window"):
        open_mixture(too_small)


def test_a_wrong_label_in_the_index_is_noticed(root: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [6, 6], text=True)
    data = DataConfig.model_validate({"path": str(tmp_path / "a")})
    open_mixture(data, read_text=True).check_indexes()
    index = np.load(tmp_path / "a" / "index.npy", mmap_mode="r+")
    index["label"][0] ^= 1
    index.flush()
    with pytest.raises(InputError, match=r"index\.npy: its checksum is not that of the manifest\. Run `pomscale data"):
        open_mixture(data, read_text=True).check_indexes()
