"""Pictures to shards and back: what is stored, what is refused, what is listed."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_pipelines.check.verify import verify
from data_pipelines.encode.dry_run import describe
from data_pipelines.encode.encode import encode
from data_pipelines.shards.parts import PartStore
from data_pipelines.shards.writers import PartWriter, Record
from pomscale.base.errors import InputError, PomscaleError
from pomscale.codecs import build_codec
from pomscale.codecs.pixel import PixelCodec
from pomscale.config.encode import EncodeRecipe
from pomscale.media.pictures import decode_picture, fit_picture
from pomscale.shards.schema import FAILURES_NAME, MANIFEST_NAME, read_manifest
from support.encoding import contents, only, read_all, shard_members
from support.tiny_models import save_vae

MakeRecipe = Callable[..., EncodeRecipe]


def square_pixels(path: Path, size: int) -> np.ndarray:
    with path.open("rb") as stream:
        return fit_picture(decode_picture(stream, 3).image, (size, size), "lanczos")


def write_blank(folder: Path, count: int, side: int = 4) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("L", (side, side), i).save(folder / f"{i}.png")


def test_from_files_to_pixels_again(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures)
    report = encode(recipe, progress=False)
    dataset = only(report)
    assert (dataset.num_samples, dataset.num_failures, dataset.num_shards, report.exit_code) == (21, 0, 5, 0)
    assert verify(recipe.output).problems == []

    manifest = read_manifest(recipe.output)
    assert manifest.class_names == ("cat", "dog", "eel")
    assert [group.shape for group in manifest.groups] == [(12, 8, 8)]
    codec = build_codec(recipe.codec)
    origins = [json.loads(member) for member in shard_members(Path(recipe.output), ".json")]
    for flip in (False, True):
        latents, labels = read_all(Path(recipe.output), flip=flip)
        shown = (codec.decode(torch.from_numpy(latents)) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for picture, label, origin in zip(shown, labels, origins, strict=True):
            pixels = square_pixels(pictures / origin["source"], 16)
            np.testing.assert_array_equal(picture, pixels[:, ::-1] if flip else pixels)
            assert manifest.class_names[label] == Path(origin["source"]).parent.name
    both = np.concatenate([read_all(Path(recipe.output), flip=flip)[0] for flip in (False, True)])
    np.testing.assert_allclose(manifest.latents.mean, both.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(manifest.latents.std, both.std((0, 2, 3)), rtol=1e-5)
    assert manifest.latents.num_values == both[:, 0].size


def test_shards_open_with_stock_webdataset_and_tar(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    shards = sorted(str(path) for path in Path(recipe.output).glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert len(samples) == 21
    assert {"latent.npy", "latent_flip.npy", "cls", "json"} <= set(samples[0])
    assert samples[0]["latent.npy"].shape == (12, 8, 8)
    assert samples[0]["latent.npy"].dtype == np.float16
    names = {sample["json"]["source"] for sample in samples}
    assert len(names) == 21
    listing = subprocess.run(["tar", "-tvf", shards[0]], capture_output=True, text=True, check=True).stdout
    assert listing.count("\n") == 5 * 4
    assert "1970-01-01" in listing


def test_classes_are_mixed_over_the_shards(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    for class_name in "abcd":
        write_blank(tmp_path / "in" / class_name, 10)
    recipe = make_recipe(tmp_path / "in", transform={"size": 4}, shard_samples=20)
    encode(recipe, progress=False)
    assert set(read_all(Path(recipe.output))[1][:20].tolist()) == {0, 1, 2, 3}


def test_bad_pictures_are_listed_and_the_rest_goes_on(pictures: Path, make_recipe: MakeRecipe) -> None:
    (pictures / "cat" / "bad.png").write_bytes(b"this is no picture")
    whole = (pictures / "dog" / "00.jpg").read_bytes()
    (pictures / "dog" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "eel" / "empty.webp").write_bytes(b"")
    recipe = make_recipe(pictures)
    report = encode(recipe, progress=False)
    assert (only(report).num_samples, only(report).num_failures, report.exit_code) == (21, 3, 3)
    assert FAILURES_NAME in str(report)
    lines = (Path(recipe.output) / FAILURES_NAME).read_text().splitlines()
    failures = {Path(entry["path"]).name: entry["reason"] for entry in map(json.loads, lines)}
    assert set(failures) == {"bad.png", "cut.jpg", "empty.webp"}
    assert all(failures.values())
    assert verify(recipe.output).problems == []
    # The second run has nothing to do and says the same.
    again = encode(recipe, progress=False)
    assert (only(again).num_failures, again.num_resumed, again.num_made) == (3, report.num_parts, 0)
    assert again.exit_code == 3


def test_nothing_but_bad_pictures_is_an_error(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "1.png").write_bytes(b"x")
    recipe = make_recipe(tmp_path / "in")
    with pytest.raises(PomscaleError, match=r"none of the 1 items.*a/1\.png"):
        encode(recipe, progress=False)
    assert not (Path(recipe.output) / MANIFEST_NAME).exists()
    assert not list(Path(recipe.output).glob("*.tar"))


def test_a_part_without_a_good_picture_leaves_no_shard(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    for i in range(6):
        (tmp_path / "in" / "a" / f"{i}.png").write_bytes(b"x")
    Image.new("RGB", (16, 16)).save(tmp_path / "in" / "a" / "good.png")
    recipe = make_recipe(tmp_path / "in", shard_samples=2)
    report = encode(recipe, progress=False)
    dataset = only(report)
    assert (dataset.num_samples, dataset.num_failures, dataset.num_shards, report.num_parts) == (1, 6, 1, 4)
    assert verify(recipe.output).problems == []


def test_latents_that_overflow_are_failures(
    pictures: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (16, 16), "white").save(pictures / "cat" / "white.png")
    real = PixelCodec.encode

    def blown_up(self: PixelCodec, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        latents = real(self, images, noise)
        latents[images.mean((1, 2, 3)) > 0.99] = 1e6
        return latents

    monkeypatch.setattr(PixelCodec, "encode", blown_up)
    recipe = make_recipe(pictures)
    dataset = only(encode(recipe, progress=False))
    assert (dataset.num_samples, dataset.num_failures) == (21, 1)
    line = json.loads((Path(recipe.output) / FAILURES_NAME).read_text())
    assert line["path"].endswith("cat/white.png")
    told = r"its (latent|flip) has 768 of 768 values beyond 65,504, .*float16 \(there are no others\): .*too large"
    assert re.match(told, line["reason"])


def test_the_result_depends_on_neither_threads_nor_batches(pictures: Path, make_recipe: MakeRecipe) -> None:
    results = []
    for name, changes in {"one": {"num_workers": 1}, "two": {"num_workers": 4, "batch": 64}}.items():
        recipe = make_recipe(pictures, output=str(pictures.parent / name), **changes)
        encode(recipe, progress=False)
        files = contents(Path(recipe.output))
        del files[MANIFEST_NAME]  # holds the recipe, with its output and workers
        results.append(files)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "image_folder", "path": "nowhere"},
        {"kind": "image_folder", "path": "memory://nowhere"},
        {"kind": "video_folder", "path": "nowhere"},
        {"kind": "tars", "path": "nowhere/*.tar"},
        {"kind": "table", "path": "nowhere.csv", "media": "{path}"},
    ],
)
def test_the_source_is_looked_for_before_a_network(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, source: dict[str, str]
) -> None:
    """A network may be looked for on the internet, for half a minute."""
    monkeypatch.setattr("data_pipelines.encode.setup.Encoders.__init__", lambda *_: pytest.fail("the network is first"))
    recipe = make_recipe(Path(), source=source, transform={"size": 16})
    for action in (encode, describe):
        with pytest.raises(InputError, match=r"source\.path: .*nowhere"):
            action(recipe)


def test_an_output_of_another_encode_is_refused(pictures: Path, make_recipe: MakeRecipe) -> None:
    encode(make_recipe(pictures), progress=False)
    before = contents(pictures.parent / "latents")
    with pytest.raises(InputError, match=r"transform is .*size=16.*there and .*size=8.*choose another output"):
        encode(make_recipe(pictures, transform={"size": 8, "flip": True}), progress=False)
    with pytest.raises(InputError, match=r"codec.*'block': 2.*'block': 4"):
        encode(make_recipe(pictures, codec={"name": "pixel", "block": 4}), progress=False)
    Image.new("RGB", (16, 16)).save(pictures / "cat" / "new.png")
    with pytest.raises(InputError, match="it is not what it was"):
        encode(make_recipe(pictures), progress=False, rescan=True)
    assert contents(pictures.parent / "latents") == before


def test_a_size_the_codec_cannot_take_is_refused_before_anything_is_written(
    pictures: Path, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(pictures, transform={"size": 15})
    with pytest.raises(InputError, match="15x15"):
        encode(recipe, progress=False)
    assert not Path(recipe.output).exists()


def test_the_dry_run_leaves_nothing_and_guesses_well(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures)
    text = describe(recipe)
    assert "21 items in 3 classes" in text
    assert "5 parts" in text
    assert "time " in text
    assert not Path(recipe.output).exists()
    guess = int(text.split("parts, ")[1].split(" bytes")[0].replace(",", ""))
    encode(recipe, progress=False)
    assert guess == pytest.approx(
        sum(len(c) for n, c in contents(Path(recipe.output)).items() if "tar" in n) / 21, rel=0.3
    )


def test_progress_is_plain_lines_without_a_terminal(
    pictures: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(pictures)
    encode(recipe)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "21 of 21" in captured.err
    assert "0 failed" in captured.err
    row = json.loads((Path(recipe.output) / "parts" / "task-00000" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (row["samples"], row["encode/failed"]) == (21, 0)


@pytest.mark.parametrize("store", ["moments", "sample"])
def test_with_a_real_vae(pictures: Path, make_recipe: MakeRecipe, tmp_path: Path, store: str) -> None:
    codec = {"name": "vae", "path": str(save_vae(tmp_path / "vae", seed=0)), "store": store}
    recipe = make_recipe(pictures, codec=codec)
    encode(recipe, progress=False)
    assert verify(recipe.output).problems == []
    manifest = read_manifest(recipe.output)
    assert manifest.groups[0].shape == (4, 8, 8)
    assert manifest.stored_shape(0) == ((8, 8, 8) if store == "moments" else (4, 8, 8))
    draws = [read_all(Path(recipe.output), "dataset", first_position=21 * i, flip=i % 2 == 1)[0] for i in range(60)]
    latents = np.concatenate(draws)
    np.testing.assert_allclose(latents.mean((0, 2, 3)), 0.0, atol=0.05)
    np.testing.assert_allclose(latents.std((0, 2, 3)), 1.0, rtol=0.05)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    gc.collect()  # what a failed encode had mapped hangs on its traceback
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_finished(pictures: Path, make_recipe: MakeRecipe, small_disk: Path) -> None:
    recipe = make_recipe(pictures, output=str(small_disk / "latents"))
    with pytest.raises(PomscaleError, match=r"cannot write .*shard-00000\d\.tar: .*No space left.*continue"):
        encode(recipe, progress=False)
    kept = contents(small_disk)
    assert "latents/shard-000000.tar" in kept
    assert not [name for name in kept if name.endswith(".tmp")]
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    report = encode(recipe, progress=False)
    assert report.num_resumed >= 1
    assert verify(recipe.output).problems == []


def test_a_file_size_limit_is_told_like_a_full_disk(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(PomscaleError, match=r"cannot write .*shard-000000\.tar: .*File too large"):
            encode(recipe, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [name for name in contents(Path(recipe.output)) if name.endswith((".tmp", ".tar"))]


def test_a_folder_that_cannot_be_made_is_named(pictures: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="this folder cannot be made"):
        encode(make_recipe(pictures, output=str(tmp_path / "file" / "latents")), progress=False)
    assert os.path.getsize(tmp_path / "file") == 0


def test_what_a_killed_writer_left_is_removed(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    output = Path(recipe.output)
    before = contents(output)
    # As a kill leaves it: a part without a record, and half of its files.
    (output / "parts" / "part-000001.json").unlink()
    for name in ("shard-000001.tar.123-0a1b2c3d", "parts/part-000001.npy.9-00000000", "parts/plan.json.1-00000001"):
        (output / f"{name}.tmp").write_bytes(b"half")
    (output / "mine.tmp").write_bytes(b"of somebody else")
    encode(recipe, progress=False)
    assert (output / "mine.tmp").exists()
    (output / "mine.tmp").unlink()
    assert contents(output) == before


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", None])
def test_a_part_whose_files_were_lost_is_made_again(
    pictures: Path, make_recipe: MakeRecipe, damage: bytes | None
) -> None:
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    before = contents(Path(recipe.output))
    for name in ("part-000001.npy", "part-000003.json"):
        path = Path(recipe.output) / "parts" / name
        path.unlink() if damage is None else path.write_bytes(damage)
    assert encode(recipe, progress=False).num_resumed == 3
    assert contents(Path(recipe.output)) == before


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff"])
def test_a_damaged_manifest_is_written_again(
    pictures: Path, make_recipe: MakeRecipe, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    before = contents(Path(recipe.output))
    (Path(recipe.output) / MANIFEST_NAME).write_bytes(damage)
    assert encode(recipe, progress=False).num_made == 0
    assert contents(Path(recipe.output)) == before
    assert f"{MANIFEST_NAME}: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gone", "changed"])
def test_a_file_that_is_not_what_was_listed_is_a_failure(pictures: Path, make_recipe: MakeRecipe, name: str) -> None:
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    picture = pictures / "dog" / "03.jpg"
    picture.unlink() if name == "gone" else picture.write_bytes(b"x")
    for record in (Path(recipe.output) / "parts").glob("part-*.json"):
        record.unlink()
    report = encode(recipe, progress=False)
    assert (only(report).num_failures, report.exit_code) == (1, 3)
    reason = json.loads((Path(recipe.output) / FAILURES_NAME).read_text())["reason"]
    assert ("the file is gone" if name == "gone" else "changed since it was listed") in reason


def test_only_failed_tries_failures_again(pictures: Path, make_recipe: MakeRecipe) -> None:
    good = (pictures / "cat" / "00.png").read_bytes()
    reference = make_recipe(pictures, output=str(pictures.parent / "undisturbed"))
    encode(reference, progress=False)
    (pictures / "cat" / "00.png").write_bytes(b"x" * len(good))
    recipe = make_recipe(pictures)
    assert only(encode(recipe, progress=False)).num_failures == 1
    (pictures / "cat" / "00.png").write_bytes(good)
    assert encode(recipe, progress=False).num_made == 0
    report = encode(recipe, progress=False, only_failed=True)
    assert (report.num_made, report.exit_code) == (1, 0)
    assert not (Path(recipe.output) / FAILURES_NAME).exists()
    mended, undisturbed = contents(Path(recipe.output)), contents(Path(reference.output))
    del mended[MANIFEST_NAME], undisturbed[MANIFEST_NAME]
    assert mended == undisturbed


def test_members_are_named_as_the_contract_says(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    with tarfile.open(Path(recipe.output) / "shard-000000.tar") as tar:
        suffixes = [name.partition(".")[2] for name in tar.getnames()]
    assert suffixes == ["latent.npy", "latent_flip.npy", "cls", "json"] * 5


def test_a_source_that_has_moved_is_not_a_source_of_failures(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    before = contents(Path(recipe.output))
    (Path(recipe.output) / "parts" / "part-000001.json").unlink()
    moved = pictures.rename(pictures.parent / "elsewhere")
    with pytest.raises(InputError, match=r"none of 21 listed items .*pictures as it was.*source\.path="):
        encode(recipe, progress=False)
    encode(make_recipe(moved), progress=False)
    after = contents(Path(recipe.output))
    del before[MANIFEST_NAME], after[MANIFEST_NAME]  # hold the recipe, with the path of its source
    assert after == before


def test_a_write_that_fails_is_never_followed_by_the_commit_of_its_part(
    pictures: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, reference = make_recipe(pictures), make_recipe(pictures, output=str(pictures.parent / "undisturbed"))
    encode(reference, progress=False)
    real, calls = PartWriter.add, iter(range(10**6))

    def failing(self: PartWriter, group: int, record: Record) -> int:
        if next(calls) == 9:  # the last record of the second part: its commit is next in the queue
            raise PomscaleError("the disk was full for a moment")
        return real(self, group, record)

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "add", failing)
        with pytest.raises(PomscaleError, match="for a moment"):
            encode(recipe, progress=False)
    assert {path.name for path in (Path(recipe.output) / "parts").glob("part-*.json")} == {"part-000000.json"}
    encode(recipe, progress=False)
    files = [contents(Path(one.output)) for one in (recipe, reference)]
    for one in files:
        del one[MANIFEST_NAME]  # holds the recipe, with its output
    assert files[0] == files[1]


def test_a_part_that_is_made_again_does_not_count_until_it_is_whole(
    pictures: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = (pictures / "cat" / "00.png").read_bytes()
    (pictures / "cat" / "00.png").write_bytes(b"x" * len(good))
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    (pictures / "cat" / "00.png").write_bytes(good)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartStore, "commit", killed)  # the shard has its name, the record is not written
        with pytest.raises(KeyboardInterrupt):
            encode(recipe, progress=False, only_failed=True)
    assert not (Path(recipe.output) / MANIFEST_NAME).exists()
    report = encode(recipe, progress=False)
    assert (report.num_made, only(report).num_failures) == (1, 0)
    assert verify(recipe.output).problems == []


def test_another_source_is_another_encode(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    write_blank(tmp_path / "in" / "a", 6)
    (tmp_path / "table.jsonl").write_text("".join(f'{{"file": "a/{i}.png", "name": "n{i}"}}\n' for i in range(6)))
    source = {"kind": "table", "path": str(tmp_path / "table.jsonl"), "root": str(tmp_path / "in"), "media": "{file}"}
    encode(make_recipe(tmp_path, source=source), progress=False)
    with pytest.raises(InputError, match=r"source is .*'caption': None.*there and .*'caption': 'name'.* here"):
        encode(make_recipe(tmp_path, source=source | {"caption": "name"}), progress=False)


def of_before(recipe: EncodeRecipe) -> None:
    """Change what an encode left to what it left before sources had versions and a field `media`."""
    folder = Path(recipe.output) / "parts"
    totals, plan = (json.loads((folder / name).read_text()) for name in ("items.json", "plan.json"))
    del totals["listing_version"]
    plan["source"].pop("media", None)
    (folder / "items.json").write_text(json.dumps(totals))
    (folder / "plan.json").write_text(json.dumps(plan))


def test_an_encode_of_before_goes_on_if_its_source_is_listed_as_then(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    write_blank(tmp_path / "in", 6)
    subprocess.run("tar --sort=name -cf ../0.tar *", shell=True, check=True, cwd=tmp_path / "in")
    source = {"kind": "tars", "path": str(tmp_path / "0.tar")}
    recipe = make_recipe(tmp_path, source=source)
    encode(recipe, progress=False)
    before = contents(Path(recipe.output))
    of_before(recipe)
    (tmp_path / "0.tar").rename(tmp_path / "away.tar")
    encode(recipe, progress=False)  # all is done, so the source may be away
    (tmp_path / "away.tar").rename(tmp_path / "0.tar")
    (tmp_path / "latents/parts/part-000000.json").unlink()
    encode(recipe, progress=False)
    assert {**contents(Path(recipe.output)), "parts/plan.json": b""} == {**before, "parts/plan.json": b""}
    of_before(recipe)
    for name in ("items.json", "plan.json"):  # as if it had listed other items then
        path = tmp_path / "latents/parts" / name
        path.write_text(re.sub(r'("(source_)?fingerprint": )"\w+"', rf'\1"{"0" * 64}"', path.read_text()))
    (tmp_path / "latents/parts/part-000000.json").unlink()
    with pytest.raises(InputError, match=r"this version of pomscale lists it in another way .*; choose another output"):
        encode(recipe, progress=False)


def test_failures_are_not_tried_again_where_the_source_is_away(pictures: Path, make_recipe: MakeRecipe) -> None:
    (pictures / "cat" / "00.png").write_bytes(b"damaged")
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    before = contents(Path(recipe.output))
    pictures.rename(pictures.parent / "unmounted")
    with pytest.raises(InputError, match="none of 21 listed items"):
        encode(recipe, progress=False, only_failed=True)
    assert contents(Path(recipe.output)) == before


def test_a_source_that_vanishes_on_the_way_is_not_a_source_of_failures(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe, away = make_recipe(pictures, num_workers=1), pictures.parent / "unmounted"
    calls = iter(range(10**6))

    def unmount_after_a_while() -> bool:
        if next(calls) == 8:
            pictures.rename(away)
        return False

    with pytest.raises(InputError, match="none of 21 listed items"):
        encode(recipe, progress=False, stop=unmount_after_a_while)
    away.rename(pictures)
    assert (only(encode(recipe, progress=False)).num_samples, verify(recipe.output).problems) == (21, [])


def test_a_shard_whose_group_has_no_sample_left_is_removed(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    write_blank(tmp_path / "in" / "a", 5, side=16)
    wide = tmp_path / "in" / "a" / "wide.png"
    Image.new("RGB", (40, 10)).save(wide)
    recipe = make_recipe(tmp_path / "in", transform={"buckets": [[16, 16], [8, 32]]}, shard_samples=10)
    encode(recipe, progress=False)
    assert len(list(Path(recipe.output).glob("shard-*.tar"))) == 2
    wide.write_bytes(b"x" * wide.stat().st_size)
    (Path(recipe.output) / "parts" / "part-000000.json").unlink()
    assert only(encode(recipe, progress=False)).num_failures == 1
    assert verify(recipe.output).problems == []
