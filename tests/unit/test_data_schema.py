from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pomscale.config.schema import PixelCodecConfig, SdVaeCodecConfig
from pomscale.data.schema import (
    MANIFEST_NAME,
    CodecInfo,
    IndexInfo,
    LatentInfo,
    Manifest,
    Normalization,
    ShardInfo,
    check_compatible,
    read_manifest,
)
from pomscale.errors import InputError


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        pomscale_version="0",
        modality="image",
        codec=CodecInfo(
            config=SdVaeCodecConfig(name="sd_vae", path="/here"), identity="i", scaling_factor=0.5, shift=0.25
        ),
        latent=LatentInfo(shape=(2, 4, 4), dtype="float16", stores_moments=True, mean=(1.0, 2.0), std=(3.0, 4.0)),
        transform={"size": 32},
        class_names=("a", "b"),
        num_samples=2,
        num_failures=0,
        source_fingerprint="f",
        shards=(ShardInfo(name="s", num_samples=2, num_bytes=1, sha256="h"),),
        index=IndexInfo(num_bytes=1, sha256="h"),
        recipe={},
    )


def test_manifest_survives_the_disk(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(manifest.model_dump_json())
    assert read_manifest(tmp_path) == manifest
    assert manifest.latent.stored_shape == (4, 4, 4)


def test_missing_unfinished_and_foreign_datasets(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is the encode finished"):
        read_manifest(tmp_path)
    values = json.loads(manifest.model_dump_json()) | {"schema_version": 2}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"schema_version.*version 1"):
        read_manifest(tmp_path)
    values = json.loads(manifest.model_dump_json()) | {"num_samples": 3}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"num_samples is 3, but the shards have 2 samples"):
        read_manifest(tmp_path)
    for content in (b"{", b"\xff"):
        (tmp_path / MANIFEST_NAME).write_bytes(content)
        with pytest.raises(InputError, match=r"manifest\.json"):
            read_manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).unlink()
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(InputError, match=r"manifest\.json: cannot be read"):
        read_manifest(tmp_path)


def test_normalization_rules(manifest: Manifest) -> None:
    assert Normalization.of(manifest, "codec") == Normalization((0.25, 0.25), (2.0, 2.0))
    assert Normalization.of(manifest, "dataset") == Normalization((1.0, 2.0), (3.0, 4.0))
    flat = manifest.model_copy(update={"latent": manifest.latent.model_copy(update={"std": (1.0, 0.0)})})
    with pytest.raises(InputError, match="channel 1 of the dataset is constant"):
        Normalization.of(flat, "dataset")


def test_fingerprint_follows_the_shards(manifest: Manifest) -> None:
    other = manifest.model_copy(update={"shards": (manifest.shards[0].model_copy(update={"sha256": "g"}),)})
    assert other.fingerprint != manifest.fingerprint
    assert manifest.model_copy(update={"num_failures": 3}).fingerprint == manifest.fingerprint


def test_datasets_that_do_not_fit_the_recipe_are_refused(manifest: Manifest) -> None:
    elsewhere = SdVaeCodecConfig(name="sd_vae", path="/there", precision="bf16")
    check_compatible("d", manifest, elsewhere, (2, 4, 4), 2)
    with pytest.raises(InputError, match=r"dataset d: .*sd_vae.*pixel.*encode"):
        check_compatible("d", manifest, PixelCodecConfig(name="pixel"), (2, 4, 4), 2)
    with pytest.raises(InputError, match=r"'moments'.*'sample'"):
        check_compatible("d", manifest, SdVaeCodecConfig(name="sd_vae", store="sample"), (2, 4, 4), 2)
    with pytest.raises(InputError, match=r"\(2, 4, 4\).*\(2, 8, 8\)"):
        check_compatible("d", manifest, elsewhere, (2, 8, 8), 2)
    with pytest.raises(InputError, match=r"2 classes.*num_classes is 3"):
        check_compatible("d", manifest, elsewhere, (2, 4, 4), 3)


def test_reading_a_manifest_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, pomscale.data.schema; print({'torch', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
