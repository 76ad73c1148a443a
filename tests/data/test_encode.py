from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from tiny_vae import save_vae

from data_pipelines.common import encode as encode_module
from data_pipelines.common.encode import describe, encode
from data_pipelines.common.show import info, show
from data_pipelines.common.verify import verify
from data_pipelines.images.transform import load_picture
from pomscale.codecs import build_codec
from pomscale.config.schema import EncodeRecipe
from pomscale.data.dataset import LatentDataset
from pomscale.data.schema import FAILURES_NAME, MANIFEST_NAME, read_manifest
from pomscale.errors import InputError, PomscaleError

MakeRecipe = Callable[..., EncodeRecipe]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_from_files_to_pixels_again(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures)
    report = encode(recipe, progress=False)
    assert (report.num_samples, report.num_failures, report.num_shards, report.exit_code) == (21, 0, 5, 0)
    assert verify(recipe.output).problems == []

    manifest = read_manifest(recipe.output)
    assert manifest.class_names == ("cat", "dog", "eel")
    assert manifest.latent.shape == (12, 8, 8)
    codec = build_codec(recipe.codec)
    dataset = LatentDataset.open(recipe.output, "codec")
    records = np.arange(21)
    for flip in (0.0, 1.0):
        latents, labels = dataset.read(records, records, seed=0, flip_probability=flip)
        shown = (codec.decode(torch.from_numpy(latents)) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        position = 0
        for shard in manifest.shards:
            with tarfile.open(Path(recipe.output) / shard.name) as tar:
                for member in tar.getmembers():
                    if member.name.endswith(".json"):
                        origin = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                        pixels = load_picture(pictures / origin["source"], recipe.transform, 3).pixels
                        np.testing.assert_array_equal(shown[position], pixels[:, ::-1] if flip else pixels)
                        assert manifest.class_names[labels[position]] == origin["source"].split("/")[0]
                        position += 1
        assert position == 21

    plain = dataset.read(records, records, seed=0, flip_probability=0.0)[0]
    np.testing.assert_allclose(manifest.latent.mean, plain.mean((0, 2, 3)), atol=1e-2)
    both = np.concatenate([plain, dataset.read(records, records, seed=0, flip_probability=1.0)[0]])
    np.testing.assert_allclose(manifest.latent.mean, both.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(manifest.latent.std, both.std((0, 2, 3)), rtol=1e-5)


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
        (tmp_path / "in" / class_name).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (4, 4)).save(tmp_path / "in" / class_name / f"{i}.png")
    recipe = make_recipe(tmp_path / "in", transform={"size": 4}, shard_samples=20)
    encode(recipe, progress=False)
    labels = LatentDataset.open(recipe.output, "codec").read(np.arange(20), np.arange(20), seed=0, flip_probability=0)[
        1
    ]
    assert set(labels.tolist()) == {0, 1, 2, 3}


def test_bad_pictures_are_listed_and_the_rest_goes_on(pictures: Path, make_recipe: MakeRecipe) -> None:
    (pictures / "cat" / "bad.png").write_bytes(b"this is no picture")
    whole = (pictures / "dog" / "00.jpg").read_bytes()
    (pictures / "dog" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "eel" / "empty.webp").write_bytes(b"")
    recipe = make_recipe(pictures)
    report = encode(recipe, progress=False)
    assert (report.num_samples, report.num_failures, report.exit_code) == (21, 3, 3)
    assert FAILURES_NAME in str(report)
    lines = (Path(recipe.output) / FAILURES_NAME).read_text().splitlines()
    failures = {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}
    assert set(failures) == {"cat/bad.png", "dog/cut.jpg", "eel/empty.webp"}
    assert all(failures.values())
    assert verify(recipe.output).problems == []
    # The second run has nothing to do and says the same.
    again = encode(recipe, progress=False)
    assert (again.num_failures, again.num_resumed_parts, again.exit_code) == (3, report.num_parts, 3)


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
    assert (report.num_samples, report.num_failures, report.num_shards, report.num_parts) == (1, 6, 1, 4)
    assert verify(recipe.output).problems == []
    assert LatentDataset.open(recipe.output, "codec").read(np.arange(1), np.arange(1), seed=0, flip_probability=0)


def test_latents_that_overflow_are_failures(
    pictures: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (16, 16), "white").save(pictures / "cat" / "white.png")
    real = encode_module.to_images

    def blown_up(batch: list[object]) -> torch.Tensor:
        images = real(batch)  # type: ignore[arg-type]
        images[images.mean((1, 2, 3)) > 0.99] = 1e6
        return images

    monkeypatch.setattr(encode_module, "to_images", blown_up)
    recipe = make_recipe(pictures)
    report = encode(recipe, progress=False)
    assert (report.num_samples, report.num_failures) == (21, 1)
    line = json.loads((Path(recipe.output) / FAILURES_NAME).read_text())
    assert line["path"] == "cat/white.png"
    assert "not finite" in line["reason"]


def test_the_result_depends_on_neither_threads_nor_batches(pictures: Path, make_recipe: MakeRecipe) -> None:
    results = []
    for name, changes in {"one": {"num_workers": 1}, "two": {"num_workers": 4, "batch": 64}}.items():
        recipe = make_recipe(pictures, output=str(pictures.parent / name), **changes)
        encode(recipe, progress=False)
        files = contents(Path(recipe.output))
        del files[MANIFEST_NAME]  # holds the recipe, with its output and workers
        results.append(files)
    assert results[0] == results[1]


def test_an_output_of_another_encode_is_refused(pictures: Path, make_recipe: MakeRecipe) -> None:
    encode(make_recipe(pictures), progress=False)
    before = contents(pictures.parent / "latents")
    with pytest.raises(InputError, match=r"transform is size=16.*there and size=8.*choose another output"):
        encode(make_recipe(pictures, transform={"size": 8, "flip": True}), progress=False)
    with pytest.raises(InputError, match=r"codec.*'block': 2.*'block': 4"):
        encode(make_recipe(pictures, codec={"name": "pixel", "block": 4}), progress=False)
    Image.new("RGB", (16, 16)).save(pictures / "cat" / "new.png")
    with pytest.raises(InputError, match="source_fingerprint"):
        encode(make_recipe(pictures), progress=False)
    assert contents(pictures.parent / "latents") == before


def test_a_size_the_codec_cannot_take_is_refused_before_anything_is_written(
    pictures: Path, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(pictures, transform={"size": 15})
    with pytest.raises(InputError, match="15x15"):
        encode(recipe, progress=False)
    assert not Path(recipe.output).exists()


def test_the_dry_run_writes_nothing_and_guesses_well(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures)
    text = describe(recipe)
    assert "21 pictures in 3 classes" in text
    assert "5 shards" in text
    assert not Path(recipe.output).exists()
    guess = int(text.split("about ")[1].split(" bytes")[0].replace(",", ""))
    encode(recipe, progress=False)
    assert guess == pytest.approx(
        sum(len(c) for n, c in contents(Path(recipe.output)).items() if "tar" in n) / 21, rel=0.3
    )


def test_progress_is_plain_lines_without_a_terminal(
    pictures: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(make_recipe(pictures))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "21 of 21" in captured.err
    assert "0 failed" in captured.err


def test_info_and_show(pictures: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    text = info(recipe.output)
    assert "21 in 3 classes" in text
    assert "'block': 2" in text
    text = show(recipe.output, build_codec(recipe.codec), 100, tmp_path / "grid.png")
    assert "21 samples, sorted by class (cat: 7, dog: 7, eel: 7)" in text
    assert Image.open(tmp_path / "grid.png").size == (5 * 34 + 2, 5 * 34 + 2)
    other = build_codec(make_recipe(pictures, codec={"name": "pixel", "block": 4}).codec)
    with pytest.raises(InputError, match="not the one that made the latents"):
        show(recipe.output, other, 4, tmp_path / "grid.png")


@pytest.mark.parametrize("store", ["moments", "sample"])
def test_with_a_real_vae(pictures: Path, make_recipe: MakeRecipe, tmp_path: Path, store: str) -> None:
    codec = {"name": "sd_vae", "path": str(save_vae(tmp_path / "vae", seed=0)), "store": store}
    recipe = make_recipe(pictures, codec=codec)
    encode(recipe, progress=False)
    assert verify(recipe.output).problems == []
    manifest = read_manifest(recipe.output)
    assert manifest.latent.shape == (4, 8, 8)
    assert manifest.latent.stored_shape == ((8, 8, 8) if store == "moments" else (4, 8, 8))
    records = np.arange(21)
    dataset = LatentDataset.open(recipe.output, "dataset")
    draws = [dataset.read(records, records + 21 * i, seed=0, flip_probability=0.5)[0] for i in range(60)]
    latents = np.concatenate(draws)
    np.testing.assert_allclose(latents.mean((0, 2, 3)), 0.0, atol=0.05)
    np.testing.assert_allclose(latents.std((0, 2, 3)), 1.0, rtol=0.05)
    assert "samples, sorted by class" in show(recipe.output, build_codec(recipe.codec), 4, tmp_path / "grid.png")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_finished(pictures: Path, make_recipe: MakeRecipe, small_disk: Path) -> None:
    recipe = make_recipe(pictures, output=str(small_disk / "latents"))
    with pytest.raises(PomscaleError, match=r"cannot write .*shard-00000\d\.tar: .*No space left.*go on"):
        encode(recipe, progress=False)
    kept = contents(small_disk)
    assert "latents/shard-000000.tar" in kept
    assert not [name for name in kept if name.endswith(".tmp")]
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    report = encode(recipe, progress=False)
    assert report.num_resumed_parts >= 1
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


def test_two_encodes_of_one_output_do_not_meet(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    before = contents(Path(recipe.output))
    holder = (
        "import fcntl, sys; lock = open(sys.argv[1]); fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True); "
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(Path(recipe.output) / "parts" / "lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=r"another encode is at work in .*latents"):
            encode(recipe, progress=False)
        assert contents(Path(recipe.output)) == before
    finally:
        process.kill()
        process.communicate()
    encode(recipe, progress=False)


def test_a_file_system_without_locks_is_warned_of(
    pictures: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert encode(make_recipe(pictures), progress=False).num_samples == 21
    assert "do not start a second encode on this output" in capsys.readouterr().err


def test_what_a_killed_writer_left_is_removed(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    output = Path(recipe.output)
    before = contents(output)
    for name in ("shard-000001.tar.123-0a1b2c3d.tmp", "parts/part-000001.npy.9-00000000.tmp"):
        (output / name).write_bytes(b"half")
    encode(recipe, progress=False)
    assert contents(output) == before
    (output / "mine.tmp").write_bytes(b"of somebody else")
    encode(recipe, progress=False)
    assert (output / "mine.tmp").exists()


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
    assert encode(recipe, progress=False).num_resumed_parts == 3
    assert contents(Path(recipe.output)) == before


def test_the_remedy_of_verify_mends_the_dataset(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    output = Path(recipe.output)
    before = contents(output)
    for name in ("shard-000002.tar", "index.npy"):
        content = bytearray(before[name])
        content[700] ^= 1
        (output / name).write_bytes(content)
    named = {problem.split(":")[0] for problem in verify(output).problems}
    assert named == {"shard-000002.tar", "index.npy"}
    (output / "shard-000002.tar").unlink()
    encode(recipe, progress=False)
    assert contents(output) == before
    assert verify(output).problems == []


def test_a_disk_that_fails_for_a_moment_costs_no_picture(
    pictures: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(pictures)
    real = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "03.jpg":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(PomscaleError, match=r"cannot read .*dog/03\.jpg.*again"):
            encode(recipe, progress=False)
    report = encode(recipe, progress=False)
    assert (report.num_samples, report.num_failures) == (21, 0)


def test_failures_that_are_gone_are_no_longer_listed(pictures: Path, make_recipe: MakeRecipe) -> None:
    good = (pictures / "cat" / "00.png").read_bytes()
    (pictures / "cat" / "00.png").write_bytes(b"x" * len(good))
    recipe = make_recipe(pictures, shard_samples=100)
    assert encode(recipe, progress=False).num_failures == 1
    (pictures / "cat" / "00.png").write_bytes(good)
    (Path(recipe.output) / "shard-000000.tar").unlink()
    assert encode(recipe, progress=False).num_failures == 0
    assert not (Path(recipe.output) / FAILURES_NAME).exists()
