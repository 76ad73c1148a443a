from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.check.verify import verify
from data_pipelines.encode.encode import encode
from data_pipelines.inspect.stats import stats
from data_pipelines.inspect.stats_picture import draw_stats
from data_pipelines.shards.statistics import RunningStatistics
from data_pipelines.shards.writers import Record, ShardWriter
from pomscale.base.errors import PomscaleError
from pomscale.shards.schema import read_manifest
from support.synthetic_dataset import TEXT_DIM, change_manifest, write_dataset


def write_random(folder: Path, moments: bool) -> list[np.ndarray]:
    """One shard of 20 normal latents (4, 3, 5); returns them. The manifest says what the encoder would."""
    manifest = write_dataset(folder, [20], moments=moments, shapes=[(4, 3, 5)])
    rng = np.random.default_rng(0)
    scale = np.array([1, 2, 0.5, 30]).reshape(4, 1, 1)
    arrays, running = [], RunningStatistics()
    with (folder / "shard-000000.tar").open("w+b") as stream:
        writer = ShardWriter(stream, ["latent"])
        for record in range(20):
            latent = rng.normal(100 if record == 7 else 1, scale, (4, 3, 5))
            array = np.concatenate([latent, rng.normal(-2, 1, (4, 3, 5))]) if moments else latent
            arrays.append(array.astype(np.float16))
            running.add(arrays[-1], moments)
            writer.add(Record(f"c/{record:05d}", {"latent": arrays[-1]}, record % 5, None, {}))
        writer.finish()
    result = running.result()
    assert result is not None
    change_manifest(folder, "latent", "mean", value=result.mean)
    change_manifest(folder, "latent", "std", value=result.std)
    assert manifest.num_samples == 20
    return arrays


@pytest.mark.parametrize("moments", [False, True])
def test_channels_are_measured_exactly(tmp_path: Path, moments: bool) -> None:
    arrays = np.stack(write_random(tmp_path, moments)).astype(np.float64)
    report = stats(tmp_path, progress=False)
    assert report.exit_code == 0
    for number, channel in enumerate(report.channels):
        values = arrays[:, number]
        variance = values.var() + (np.exp(arrays[:, number + 4]).mean() if moments else 0.0)
        np.testing.assert_allclose([channel.mean, channel.std], [values.mean(), np.sqrt(variance)], rtol=1e-12)
        assert (channel.least, channel.most) == (values.min(), values.max())
        outliers = np.abs(values - channel.manifest_mean) > 5 * channel.manifest_std
        np.testing.assert_allclose(channel.outlier_share, outliers.mean(), rtol=1e-12)
    assert "the same" in str(report)


def test_a_manifest_that_says_something_else_is_told(tmp_path: Path) -> None:
    write_random(tmp_path, False)
    std = list(read_manifest(tmp_path).latents.std)
    std[2] *= 1.001
    change_manifest(tmp_path, "latent", "std", value=std)
    report = stats(tmp_path, progress=False)
    assert report.disagreeing == [2]
    assert report.exit_code == 1
    assert "mean or std of channels 2 are not the manifest's" in str(report)


def test_an_encode_says_what_is_measured(pictures: Path, make_recipe) -> None:
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    report = stats(recipe.output, progress=False)
    assert report.exit_code == 0
    assert report.class_counts.tolist() == [7, 7, 7]
    assert verify(recipe.output, progress=False).exit_code == 0


def test_classes_texts_and_bytes_are_counted(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4, 5], text=True, flip=True)
    report = stats(tmp_path, num_workers=2, progress=False)
    assert report.class_counts.tolist() == [2, 2, 2, 2, 1]
    assert report.counts.texts == {1: 3, 2: 3, 3: 3}
    assert report.counts.captions == {len("caption 0"): 9}
    assert report.counts.members[".latent.npy"] == 9 * (128 + 2 * 24)
    assert report.counts.members[".text.npy"] == 9 * 128 + 2 * TEXT_DIM * 18
    text = str(report)
    assert "9 samples" in text
    assert "latent.npy 176.0" in text
    assert "tokens in each: 1 to 3, median 2" in text
    draw_stats(report, tmp_path / "pictures" / "stats.png")
    with Image.open(tmp_path / "pictures" / "stats.png") as picture:
        assert picture.width > 4 * 400


def test_text_alone_has_no_channels(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4], text=True, latents=False)
    report = stats(tmp_path, progress=False)
    assert report.channels == []
    assert report.exit_code == 0
    draw_stats(report, tmp_path / "stats.png")


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4])
    shard = tmp_path / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(PomscaleError, match=r"shard-000000.tar"):
        stats(tmp_path, progress=False)
