"""What an encode can make: buckets, several sizes, clips, captions, companion sets; and from what."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_pipelines.check.verify import verify
from data_pipelines.encode.dry_run import describe
from data_pipelines.encode.encode import encode
from pomscale.base.errors import InputError
from pomscale.codecs import build_codec, build_text_encoder
from pomscale.config.encode import EncodeRecipe
from pomscale.shards.schema import FAILURES_NAME, read_manifest
from support.encoding import contents, only, read_all, shard_members
from support.make_video import numbered_frame, write_video
from support.tiny_models import save_t5, save_vae, save_video_vae

MakeRecipe = Callable[..., EncodeRecipe]


def frames(count: int) -> list[np.ndarray]:
    return [numbered_frame(number, 36, 64) for number in range(count)]


def failures(output: str) -> dict[str, str]:
    lines = (Path(output) / FAILURES_NAME).read_text().splitlines()
    return {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}


def test_buckets_keep_the_aspect_ratio(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    rng = np.random.default_rng(0)
    sizes = [(20, 20), (18, 22), (10, 40), (12, 50), (40, 10), (33, 9), (21, 19)]
    (tmp_path / "in" / "a").mkdir(parents=True)
    for i, (height, width) in enumerate(sizes * 3):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / "a" / f"{i:02d}-{height}-{width}.png")
    buckets = [[16, 16], [8, 32], [32, 8], [4, 64]]
    recipe = make_recipe(tmp_path / "in", transform={"buckets": buckets, "flip": True}, shard_samples=6)
    report = encode(recipe, progress=False)
    assert only(report).num_samples == 21
    assert verify(recipe.output).problems == []
    manifest = read_manifest(recipe.output)
    # The bucket that no picture went to is not told.
    assert [group.target for group in manifest.groups] == [(16, 16), (8, 32), (32, 8)]
    assert [group.shape for group in manifest.groups] == [(12, 8, 8), (12, 4, 16), (12, 16, 4)]
    counts = Counter[int]()
    for shard in manifest.shards:
        counts[shard.group] += shard.num_samples
        with tarfile.open(Path(recipe.output) / shard.name) as tar:
            for name in tar.getnames():
                if name.endswith(".latent.npy"):
                    _, height, width = name.removesuffix(".latent.npy").split("-")
                    shape = np.load(io.BytesIO(tar.extractfile(name).read())).shape  # type: ignore[union-attr]
                    assert shape == manifest.groups[shard.group].shape
                    assert (shape[1] < shape[2]) == (int(height) * 1.5 < int(width))
    assert counts == {0: 9, 1: 6, 2: 6}
    again = contents(Path(recipe.output))
    for record in (Path(recipe.output) / "parts").glob("part-*.json"):
        record.unlink()
    encode(recipe, progress=False)
    assert contents(Path(recipe.output)) == again


def test_several_sizes_in_one_pass(pictures: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    vae = {"name": "vae", "path": str(save_vae(tmp_path / "vae", seed=0)), "store": "sample"}
    recipe = make_recipe(pictures, codec=vae, transform={"sizes": [16, 32], "flip": True}, batch=7)
    report = encode(recipe, progress=False)
    assert [dataset.output.name for dataset in report.datasets] == ["16", "32"]
    for size in (16, 32):
        folder = Path(recipe.output) / str(size)
        assert verify(folder).problems == []
        # As if it had been made alone.
        alone = make_recipe(
            pictures, codec=vae, transform={"size": size, "flip": True}, batch=7, output=str(tmp_path / f"alone-{size}")
        )
        encode(alone, progress=False)
        ours, reference = contents(folder), contents(Path(alone.output))
        for files in (ours, reference):
            del files["manifest.json"]  # holds the recipe, with its output
            files.pop("parts/claims", None)
        assert ours.keys() == reference.keys()
        assert [name for name in ours if ours[name] != reference[name]] == []
        assert read_manifest(folder).transform == alone.transform
    # A size whose shards are lost is made again, and only that one.
    before = contents(Path(recipe.output))
    (Path(recipe.output) / "16" / "shard-000002.tar").unlink()
    assert encode(recipe, progress=False).num_made == 1
    assert contents(Path(recipe.output)) == before


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A WebVid-like table with real mp4 files, and everything that can be wrong with them."""
    folder = tmp_path / "videos" / "000"
    folder.mkdir(parents=True)
    rows = ["videoid,page_dir,name,duration"]
    for i in range(5):
        write_video(folder / f"{i}.mp4", frames(30), 24)
        rows.append(f'{i},000,"clip number {i}, of five",1.25')
    write_video(folder / "short.mp4", frames(3), 24)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_bytes(b"this is no film" * 100)
    write_video(folder / "dumb.mp4", frames(30), 24)
    rows += ["short,000,too short,0.1", "empty,000,no bytes,0", "text,000,no film,0", "gone,000,not there,0"]
    rows += ["dumb,000,,1.25", "0,000,the first again,1.25"]
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def clip_recipe(make_recipe: MakeRecipe, folder: Path, **changes: object) -> EncodeRecipe:
    t5 = str(save_t5(folder / "t5", seed=0))
    values: dict[str, object] = {
        "source": {
            "kind": "table",
            "path": str(folder / "table.csv"),
            "root": str(folder / "videos"),
            "media": "{page_dir}/{videoid}.mp4",
            "key": "videoid",
            "caption": "name",
        },
        "codec": {
            "name": "vae",
            "path": str(save_video_vae(folder / "vae", seed=0)),
            "subfolder": "",
            "precision": "fp32",
        },
        "transform": {"kind": "video", "fps": 8, "buckets": [[9, 32, 48]], "flip": True},
        "text": {
            "path": t5,
            "tokenizer": "bytes",
            "max_length": 16,
            "precision": "fp32",
        },
        "batch": 2,
        "shard_samples": 4,
    }
    return make_recipe(folder, **(values | changes))


def test_clips_with_captions(clips: Path, make_recipe: MakeRecipe) -> None:
    recipe = clip_recipe(make_recipe, clips)
    assert "text" in describe(recipe)
    report = encode(recipe, progress=False)
    assert (only(report).num_samples, report.exit_code) == (5, 3)
    reasons = failures(recipe.output)
    assert set(reasons) == {"short", "empty", "text", "gone", "dumb", "0"}
    assert "needs at least" in reasons["short"]
    assert "gone" in reasons["gone"]
    assert "caption" in reasons["dumb"]
    assert "its key 0 is also that of" in reasons["0"]
    assert all("\n" not in reason for reason in reasons.values())
    assert verify(recipe.output).problems == []

    manifest = read_manifest(recipe.output)
    assert manifest.arrays == ("latent", "flip", "text")
    assert manifest.modality == "video"
    assert recipe.codec is not None
    assert recipe.text is not None
    codec, encoder = build_codec(recipe.codec), build_text_encoder(recipe.text)
    assert manifest.groups[0].shape == codec.latent_shape(9, 32, 48)
    captions = [member.decode() for member in shard_members(Path(recipe.output), ".txt")]
    assert sorted(captions) == [f"clip number {i}, of five" for i in range(5)]
    embeddings = [np.load(io.BytesIO(member)) for member in shard_members(Path(recipe.output), ".text.npy")]
    for caption, embedding in zip(captions, embeddings, strict=True):
        (expected,) = encoder.encode([caption])
        np.testing.assert_allclose(embedding, expected, atol=2e-3)
    assert manifest.text is not None
    (null,) = encoder.encode([""])
    stored = np.frombuffer(manifest.text.null_bytes, "<f2").reshape(manifest.text.null_length, manifest.text.dim)
    np.testing.assert_allclose(stored, null, atol=2e-3)


@pytest.mark.parametrize("store", ["sample", "moments"])
def test_pictures_become_clips_of_one_frame(clips: Path, make_recipe: MakeRecipe, store: str) -> None:
    """In a set of its own, which trains with one of clips: same codec, same texts."""
    (clips / "pictures" / "a").mkdir(parents=True)
    for number in range(5):
        Image.fromarray(numbered_frame(number, 36, 64 - 30 * (number % 2))).save(clips / f"pictures/a/{number}.png")
    of_clips = clip_recipe(make_recipe, clips, text=None)
    assert of_clips.codec is not None
    config = of_clips.codec.model_copy(update={"store": store})
    pictures = clip_recipe(
        make_recipe,
        clips,
        output=str(clips / "pictures-latents"),
        source={"kind": "image_folder", "path": str(clips / "pictures")},
        codec=config.model_dump(),
        transform={"kind": "image", "buckets": [[32, 48], [32, 32]], "flip": True},
        text=None,
    )
    assert only(encode(pictures, progress=False)).num_samples == 5
    assert verify(pictures.output).problems == []
    manifest, codec = read_manifest(pictures.output), build_codec(config)
    assert [group.shape for group in manifest.groups] == [codec.latent_shape(32, 48), codec.latent_shape(32, 32)]
    assert [group.target for group in manifest.groups] == [(32, 48), (32, 32)]
    encode(of_clips, progress=False)
    assert read_manifest(of_clips.output).latent_codec.identity == manifest.latent_codec.identity


def test_a_companion_set_holds_new_embeddings_of_the_same_records(clips: Path, make_recipe: MakeRecipe) -> None:
    latents = clip_recipe(make_recipe, clips, text=None)
    encode(latents, progress=False)
    manifest = read_manifest(latents.output)
    assert (manifest.arrays, manifest.has_captions) == (("latent", "flip"), True)
    companion = clip_recipe(
        make_recipe,
        clips,
        output=str(clips / "text"),
        source={"kind": "latents", "path": latents.output},
        codec=None,
        transform=None,
    )
    report = encode(companion, progress=False)
    assert (only(report).num_samples, report.exit_code) == (5, 0)
    assert verify(companion.output).problems == []
    other = read_manifest(companion.output)
    assert (other.arrays, other.modality) == (("text",), "text")
    assert other.keys_sha256 == manifest.keys_sha256
    assert shard_members(Path(companion.output), ".txt") == shard_members(Path(latents.output), ".txt")


def test_a_caption_that_looks_like_a_token_is_text(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """An encode that took it for the end token, and is half done, is not finished with other embeddings."""
    (tmp_path / "table.csv").write_text("id,caption\n1,</s>\n2,a red dog\n")
    source = {"kind": "table", "path": str(tmp_path / "table.csv"), "media": "{id}", "key": "id", "caption": "caption"}
    text = {"path": str(save_t5(tmp_path / "t5", seed=0)), "tokenizer": "bytes", "max_length": 16}
    recipe = make_recipe(tmp_path, source=source, codec=None, transform=None, text=text)
    encode(recipe, progress=False)
    lengths = {len(np.load(io.BytesIO(member))) for member in shard_members(Path(recipe.output), ".text.npy")}
    assert lengths == {5, 10}
    assert read_manifest(recipe.output).text_version == 2

    plan = Path(recipe.output) / "parts" / "plan.json"
    of_before = json.loads(plan.read_text())
    del of_before["text_version"]
    plan.write_text(json.dumps(of_before))
    told = r"text_version is 1 there and 2 here; choose another output.*, or use the version of pomscale"
    with pytest.raises(InputError, match=told):
        encode(recipe, progress=False)


def test_tars_of_stock_webdataset(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    rng = np.random.default_rng(0)
    with webdataset.ShardWriter(str(tmp_path / "raw-%03d.tar"), maxcount=6, verbose=0) as writer:
        for i in range(14):
            picture = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
            writer.write({"__key__": f"{i:05d}", "jpg": picture, "cls": i % 3, "txt": f"picture {i}"})
    source = {"kind": "tars", "path": str(tmp_path / "raw-{000..002}.tar"), "label": "cls", "caption": "txt"}
    recipe = make_recipe(tmp_path, source=source, shard_samples=4)
    assert only(encode(recipe, progress=False)).num_samples == 14
    assert verify(recipe.output).problems == []
    assert read_manifest(recipe.output).num_classes == 3
    # Neighbours stay neighbours: tars are read from front to back.
    assert [member.decode() for member in shard_members(Path(recipe.output), ".txt")] == [
        f"picture {i}" for i in range(14)
    ]
    assert read_all(Path(recipe.output))[1].tolist() == [i % 3 for i in range(14)]


def test_a_network_that_gives_nan_costs_only_what_it_spoiled(
    clips: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pomscale.codecs.text.encoder import PretrainedTextEncoder  # noqa: PLC0415  transformers takes seconds to import

    real = PretrainedTextEncoder.encode

    def spoiled(self: PretrainedTextEncoder, captions: list[str]) -> list[np.ndarray]:
        embeddings = real(self, captions)
        return [e * np.nan if "number 3" in c else e for c, e in zip(captions, embeddings, strict=True)]

    monkeypatch.setattr(PretrainedTextEncoder, "encode", spoiled)
    recipe = clip_recipe(make_recipe, clips)
    assert only(encode(recipe, progress=False)).num_samples == 4
    told = r"its text has 256 of 256 values that are NaN \(there are no others\): .*weights, and try precision: fp32"
    assert re.fullmatch(told, failures(recipe.output)["3"])


@pytest.mark.parametrize("spoiled_sizes", [{16}, {8}, {8, 16}])
def test_an_item_that_fails_in_several_sizes_is_one_item(
    pictures: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, spoiled_sizes: set[int]
) -> None:
    from pomscale.codecs.pixel import PixelCodec  # noqa: PLC0415

    real = PixelCodec.encode

    def spoiled(self: PixelCodec, pixels: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        latents = real(self, pixels, noise).clone()
        if pixels.shape[-1] in spoiled_sizes:
            latents[0] = torch.nan
        return latents

    monkeypatch.setattr(PixelCodec, "encode", spoiled)
    recipe = make_recipe(pictures, transform={"sizes": [16, 8]})
    report = encode(recipe, progress=False)
    num_batches = 9  # of 3 and 2 items in each part of 5, and one of the last item
    assert [dataset.num_failures for dataset in report.datasets] == [
        num_batches * (s in spoiled_sizes) for s in (16, 8)
    ]
    assert report.num_failed == num_batches
    rows = (Path(recipe.output) / "parts" / "task-00000" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["samples"] == 21


def test_a_batch_that_does_not_fit_is_told(
    pictures: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pomscale.base.errors import PomscaleError  # noqa: PLC0415
    from pomscale.codecs.pixel import PixelCodec  # noqa: PLC0415

    def too_large(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PixelCodec, "encode", too_large)
    with pytest.raises(PomscaleError, match=r"no room for a batch of 3.*Lower `batch`"):
        encode(make_recipe(pictures), progress=False)
