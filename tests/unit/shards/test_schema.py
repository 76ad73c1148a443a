from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pomscale.base.errors import InputError
from pomscale.config.codecs import PixelCodecConfig, VaeCodecConfig
from pomscale.config.encode import ImageTransformConfig
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.shards.schema import (
    MANIFEST_NAME,
    CodecInfo,
    GroupInfo,
    IndexInfo,
    LatentInfo,
    Manifest,
    Normalization,
    ShardInfo,
    SourceInfo,
    check_compatible,
    check_text,
    read_manifest,
)


@pytest.fixture
def manifest() -> Manifest:
    """Two buckets; the second one has no shards."""
    return Manifest(
        pomscale_version="0",
        codec=CodecInfo(
            config=VaeCodecConfig(name="vae", path="/here", store="moments"),
            identity="i",
            scaling_factor=0.5,
            shift=0.25,
        ),
        latent=LatentInfo(stores_moments=True, has_flip=False, num_values=32, mean=(1.0, 2.0), std=(3.0, 4.0)),
        transform=ImageTransformConfig(buckets=[(32, 32), (32, 64)]),
        text=None,
        has_captions=False,
        class_names=("a", "b"),
        num_samples=2,
        num_failures=0,
        source=SourceInfo(fingerprint="f", num_items=2),
        groups=(GroupInfo(shape=(2, 4, 4), target=(32, 32)), GroupInfo(shape=(2, 4, 8), target=(32, 64))),
        shards=(ShardInfo(name="s.tar", num_samples=2, num_bytes=1, sha256="h"),),
        keys_sha256="k",
        index=IndexInfo(num_bytes=1, sha256="h"),
        recipe={},
    )


def changed(manifest: Manifest, **values: object) -> Manifest:
    """Read from JSON, so that it is checked."""
    return Manifest.model_validate_json(json.dumps(json.loads(manifest.model_dump_json()) | values))


def test_manifest_survives_the_disk(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(manifest.model_dump_json())
    assert read_manifest(tmp_path) == manifest
    assert [manifest.stored_shape(group) for group in range(2)] == [(4, 4, 4), (4, 4, 8)]
    assert manifest.arrays == ("latent",)
    assert manifest.modality == "image"


def test_what_a_manifest_cannot_say(manifest: Manifest) -> None:
    shard = manifest.shards[0].model_dump()
    for values, message in (
        ({"codec": None}, "belong together"),
        ({"shards": [shard | {"group": 2}]}, "a group that is not there"),
        ({"shards": [shard | {"group": 1}, shard], "num_samples": 4}, "not sorted by group"),
    ):
        with pytest.raises(ValidationError, match=message):
            changed(manifest, **values)


def test_missing_unfinished_and_foreign_datasets(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is the encode finished"):
        read_manifest(tmp_path)
    values = json.loads(manifest.model_dump_json()) | {"schema_version": 1}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"schema_version.*version 2"):
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
    flat = manifest.model_copy(update={"latent": manifest.latents.model_copy(update={"std": (1.0, 0.0)})})
    with pytest.raises(InputError, match="channel 1 of the dataset is constant"):
        Normalization.of(flat, "dataset")


def test_fingerprint_follows_the_shards(manifest: Manifest) -> None:
    other = manifest.model_copy(update={"shards": (manifest.shards[0].model_copy(update={"sha256": "g"}),)})
    assert other.fingerprint != manifest.fingerprint
    assert manifest.model_copy(update={"num_failures": 3}).fingerprint == manifest.fingerprint


def test_datasets_that_do_not_fit_the_recipe_are_refused(manifest: Manifest) -> None:
    elsewhere = VaeCodecConfig(name="vae", path="/there", precision="bf16")
    model = ImageModelConfig(latent_shape=(2, 4, 4), num_classes=2, dim=8, depth=1)
    check_compatible("d", manifest, elsewhere, model)
    with pytest.raises(InputError, match=r"dataset d: .*vae.*pixel.*encode"):
        check_compatible("d", manifest, PixelCodecConfig(name="pixel"), model)
    with pytest.raises(InputError, match=r"'moments'.*'sample'"):
        check_compatible("d", manifest, VaeCodecConfig(name="vae", path="/here", store="sample"), model)
    with pytest.raises(InputError, match=r"\(2, 4, 4\).*\(2, 8, 8\)"):
        check_compatible("d", manifest, elsewhere, model.model_copy(update={"latent_shape": (2, 8, 8)}))
    with pytest.raises(InputError, match=r"2 classes.*num_classes is 3"):
        check_compatible("d", manifest, elsewhere, model.model_copy(update={"num_classes": 3}))
    both = changed(manifest, shards=[{**manifest.shards[0].model_dump(), "group": i} for i in range(2)], num_samples=4)
    with pytest.raises(InputError, match=r"\(2, 4, 8\).*\(2, 4, 4\)"):
        check_compatible("d", both, elsewhere, model)
    text_only = changed(manifest, codec=None, latent=None, transform=None)
    with pytest.raises(InputError, match=r"dataset d: has text embeddings and no latents"):
        check_compatible("d", text_only, elsewhere, model)


def clips(manifest: Manifest, shape: tuple[int, ...]) -> Manifest:
    codec = {"config": {"name": "vae", "path": "/here"}, "identity": "i", "scaling_factor": 0.5, "shift": 0.25}
    return changed(manifest, codec=codec, class_names=(), groups=[{"shape": shape, "target": (1,)}])


VIDEO_MODEL = VideoModelConfig(kind="video", latent_shape=(2, 6, 4, 4), text_dim=8, patch_frames=3, dim=8, depth=1)


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 3, 4, 8), (2, 1, 8, 4), (2, 4, 4)])
def test_smaller_clips_and_pictures_fit_a_model_of_clips(manifest: Manifest, shape: tuple[int, ...]) -> None:
    check_compatible("d", clips(manifest, shape), VaeCodecConfig(name="vae", path="/here"), VIDEO_MODEL)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((3, 6, 4, 4), r"\(3, 6, 4, 4\).*model\.latent_shape says 2 channels"),
        ((2, 4, 4, 4), r"4 frames are not divisible by model\.patch_frames 3"),
        ((2, 3, 4, 5), r"4x5 is not divisible by model\.patch_size 2"),
        ((2, 5, 5), r"5x5 is not divisible by model\.patch_size 2"),
        ((2, 9, 4, 4), r"that is 12 tokens, and model\.latent_shape \(2, 6, 4, 4\) .* says 8"),
        ((2, 6, 6), r"that is 9 tokens"),
    ],
)
def test_clips_that_do_not_fit_the_model_are_refused(manifest: Manifest, shape: tuple[int, ...], problem: str) -> None:
    codec = VaeCodecConfig(name="vae", path="/here")
    with pytest.raises(InputError, match=rf"dataset d: .*{problem}.*Change the recipe, or encode the dataset again"):
        check_compatible("d", clips(manifest, shape), codec, VIDEO_MODEL)


def test_texts_that_do_not_fit_the_model_are_refused(manifest: Manifest) -> None:
    with pytest.raises(InputError, match=r"dataset d: has no text embeddings; .*: `text`, beside its `path`"):
        check_text("d", manifest, VIDEO_MODEL)
    null = base64.b64encode(bytes(2 * 16)).decode()
    text = {"config": {"path": "x"}, "identity": "t", "dim": 8, "null_length": 2, "null_embedding": null}
    check_text("d", changed(manifest, text=text), VIDEO_MODEL)
    with pytest.raises(InputError, match=r"dataset d: .* 16 values per token, but model\.text_dim is 8\. Set"):
        check_text("d", changed(manifest, text=text | {"dim": 16, "null_length": 1}), VIDEO_MODEL)


def test_reading_a_manifest_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, pomscale.shards.schema; print({'torch', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_constants_per_channel_are_recorded_and_scalars_keep_their_bytes(manifest: Manifest) -> None:
    assert '"scaling_factor":0.5,"shift":0.25' in manifest.model_dump_json()
    per_channel = {"scaling_factor": [0.5, 2.0], "shift": [-1.0, 3.0]}
    codec = manifest.latent_codec.model_dump() | per_channel
    other = Manifest.model_validate_json(changed(manifest, codec=codec).model_dump_json())
    assert Normalization.of(other, "codec") == Normalization((-1.0, 3.0), (2.0, 0.5))
    with pytest.raises(InputError, match=r"scale latents differently"):
        Normalization.of_mixture([manifest, other], [1.0, 1.0], "codec")
    with pytest.raises(InputError, match=r"constants of 3 and 2 channels, and its latents have 2"):
        Normalization.of(changed(manifest, codec=codec | {"shift": [0.0] * 3}), "codec")
    with pytest.raises(ValidationError):
        changed(manifest, codec=codec | {"scaling_factor": [0.5, 0.0]})


def test_a_manifest_of_an_earlier_version_names_its_codec_as_it_did(manifest: Manifest) -> None:
    codec = manifest.latent_codec.model_dump()
    codec["config"] = {"name": "sd_vae", "path": "/here", "subfolder": "", "store": "moments", "precision": "fp32"}
    assert changed(manifest, codec=codec) == manifest
