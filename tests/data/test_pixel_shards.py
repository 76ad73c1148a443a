"""Pictures stored as they are, raw and as PNG files: from files to the batch that goes to the device."""

from __future__ import annotations

import io
import itertools
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from data_pipelines.check.verify import verify
from data_pipelines.derive.merge import merge
from data_pipelines.derive.split import split
from data_pipelines.encode.dry_run import describe
from data_pipelines.encode.encode import encode
from data_pipelines.inspect.info import info
from data_pipelines.inspect.show import show
from data_pipelines.inspect.stats import stats
from data_pipelines.inspect.stats_picture import draw_stats
from pomscale.base.errors import InputError
from pomscale.codecs import build_codec
from pomscale.config.data import DataConfig
from pomscale.config.encode import EncodeRecipe
from pomscale.data.dataset import LatentDataset
from pomscale.data.loader import Loader, MicroBatch, ReadAhead
from pomscale.data.mixture import Mixture
from pomscale.data.normalize import normalize
from pomscale.media.pictures import decode_picture, fit_picture
from pomscale.shards.index import to_npy
from pomscale.shards.pictures import pack_picture
from pomscale.shards.schema import INDEX_NAME, Normalization, read_manifest
from support.damage import fix_checksum, flip_bit, overwrite
from support.encoding import contents, only, shard_members
from support.running import wait_until
from support.synthetic_dataset import change_manifest

MakeRecipe = Callable[..., EncodeRecipe]

CODINGS = ("raw", "png")


def uint8(coding: str, channels: int = 3) -> dict[str, object]:
    return {"name": "uint8", "coding": coding, "channels": channels}


def expected(pictures: Path, folder: Path, side: int, filter: str = "lanczos", channels: int = 3) -> np.ndarray:
    """Pixels (n, c, side, side) of all records, in their order, decoded from the files once more."""
    found = []
    for member in shard_members(folder, ".json"):
        with (pictures / json.loads(member)["source"]).open("rb") as stream:
            pixels = fit_picture(decode_picture(stream, channels).image, (side, side), filter)  # type: ignore[arg-type]
        found.append(pixels.transpose(2, 0, 1))
    return np.stack(found)


def read(folder: Path, flip_probability: float = 0.0, **options: object) -> tuple[torch.Tensor, LatentDataset]:
    manifest = read_manifest(folder)
    dataset = LatentDataset(folder, manifest, Normalization.of(manifest, "codec"), **options)  # type: ignore[arg-type]
    records = np.arange(len(dataset))
    return dataset.read(records, records, seed=0, flip_probability=flip_probability).latents, dataset


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(("channels", "filter"), [(3, "adm"), (1, "area")])
def test_from_files_to_the_batch(
    pictures: Path, make_recipe: MakeRecipe, coding: str, channels: int, filter: str
) -> None:
    recipe = make_recipe(
        pictures, codec=uint8(coding, channels), transform={"size": 15, "filter": filter, "flip": True}
    )
    report = encode(recipe, progress=False)
    folder = Path(recipe.output)
    assert (only(report).num_samples, report.exit_code) == (21, 0)
    assert verify(folder).problems == []
    manifest = read_manifest(folder)
    assert manifest.arrays == ("latent",)
    assert [group.shape for group in manifest.groups] == [(channels, 15, 15)]
    pixels = expected(pictures, folder, 15, filter, channels)
    latents, dataset = read(folder)
    assert latents.dtype == torch.uint8
    assert latents.is_contiguous()
    np.testing.assert_array_equal(latents, pixels)
    np.testing.assert_array_equal(read(folder, 1.0)[0], pixels[..., ::-1])
    # As float16 latents of the codec `pixel` are to a network, up to their rounding.
    seen = normalize(latents, dataset.normalization)
    torch.testing.assert_close(seen, 2.0 * (torch.from_numpy(pixels).float() / 255.0) - 1.0, rtol=0, atol=2e-7)
    np.testing.assert_allclose(manifest.latents.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(manifest.latents.std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_flips_are_drawn_by_position_and_only_where_the_recipe_allows(pictures: Path, make_recipe: MakeRecipe) -> None:
    flips = make_recipe(pictures, codec=uint8("png"))
    never = make_recipe(pictures, codec=uint8("png"), transform={"size": 16}, output=f"{flips.output}-never")
    latents = make_recipe(pictures, output=f"{flips.output}-latents")
    for recipe in (flips, never, latents):
        encode(recipe, progress=False)
    straight = read(Path(flips.output))[0]
    half = read(Path(flips.output), 0.5)[0]
    mirrored = (half == straight.flip(-1)).flatten(1).all(1)
    assert ((half == straight).flatten(1).all(1) | mirrored).all()
    assert 4 < mirrored.sum() < 17
    assert torch.equal(read(Path(never.output), 0.5)[0], straight)
    # The same draw as for a dataset that stores the flipped copies.
    folded, unflipped = (read(Path(latents.output), p)[0] for p in (0.5, 0.0))
    assert torch.equal((folded != unflipped).flatten(1).any(1), mirrored)


def after_one_part(output: Path) -> Callable[[], bool]:
    """Ask for a stop in the second part, once the first one is committed."""
    asked = itertools.count()

    def stop() -> bool:
        if next(asked) < 7:
            return False
        wait_until((output / "parts" / "part-000000.json").exists, "the record of the first part")
        return True

    return stop


def test_raw_and_png_hold_the_same_and_stop_and_go(pictures: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipes = [make_recipe(pictures, codec=uint8(coding), output=str(tmp_path / coding)) for coding in CODINGS]
    for recipe in recipes:
        assert encode(recipe, progress=False, stop=after_one_part(Path(recipe.output))).exit_code == 75
        assert encode(recipe, progress=False).num_resumed == 1
        alone = recipe.model_copy(update={"output": f"{recipe.output}-alone"})
        encode(alone, progress=False)
        here, there = contents(Path(recipe.output)), contents(Path(alone.output))
        assert {name: here[name] for name in here if name.endswith((".tar", ".npy"))} == {
            name: there[name] for name in there if name.endswith((".tar", ".npy"))
        }
    assert torch.equal(read(tmp_path / "raw")[0], read(tmp_path / "png")[0])
    with pytest.raises(InputError, match="holds parts of another encode: codec is"):
        encode(recipes[0].model_copy(update={"output": str(tmp_path / "png")}), progress=False)
    adm = make_recipe(pictures, codec=uint8("png"), transform={"size": 16, "flip": True, "filter": "adm"})
    with pytest.raises(InputError, match="holds parts of another encode: transform is"):
        encode(adm.model_copy(update={"output": str(tmp_path / "png")}), progress=False)


def test_several_sizes_and_what_they_take(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures, codec=uint8("raw"), transform={"sizes": [8, 12], "filter": "adm"})
    told = describe(recipe)
    encode(recipe, progress=False)
    for side in (8, 12):
        folder = Path(recipe.output) / str(side)
        np.testing.assert_array_equal(read(folder)[0], expected(pictures, folder, side, "adm"))
        sizes = re.search(rf"{folder}: latent .*?([\d,]+) bytes per sample", told)
        assert sizes is not None
        measured = sum(shard.num_bytes for shard in read_manifest(folder).shards) / 21
        assert int(sizes[1].replace(",", "")) == pytest.approx(measured, rel=0.9)  # the last shards are padded
        assert verify(folder).problems == []


def test_other_programs_see_pictures(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures, codec=uint8("png"))
    encode(recipe, progress=False)
    shards = sorted(str(path) for path in Path(recipe.output).glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    found = np.stack([sample["png"] for sample in samples]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(found, read(Path(recipe.output))[0])


@pytest.mark.parametrize("coding", CODINGS)
def test_the_tools_know_pixels(pictures: Path, make_recipe: MakeRecipe, tmp_path: Path, coding: str) -> None:
    recipe = make_recipe(pictures, codec=uint8(coding))
    encode(recipe, progress=False)
    folder = Path(recipe.output)
    described = info(folder)
    assert f"uint8, {coding}, flipped as they are read" in described
    assert "(latent - 127.5) * 0.00784314" in described
    measured = stats(folder, progress=False)
    assert (measured.disagreeing, measured.num_not_finite, measured.exit_code) == ([], 0, 0)
    pixels = read(folder)[0]
    assert [channel.most for channel in measured.channels] == pixels.amax((0, 2, 3)).tolist()
    draw_stats(measured, tmp_path / "stats.png")
    show(folder, build_codec(recipe.codec), 1, tmp_path / "grid.png", seed=3)  # type: ignore[arg-type]
    with Image.open(tmp_path / "grid.png") as grid:
        shown = np.asarray(grid)[2:-2, 2:-2].transpose(2, 0, 1).repeat(1)
    tile = shown.reshape(3, 16, 2, 16, 2)[:, :, 0, :, 0]  # small pictures are shown twice as large
    assert any((tile == picture).all() for picture in pixels.numpy())
    split(folder, {tmp_path / "a": 0.5, tmp_path / "b": 0.5}, progress=False)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both", progress=False)
    for made in ("a", "b", "both"):
        assert verify(tmp_path / made).problems == []
    both = read(tmp_path / "both")[0]
    assert sorted(p.numpy().tobytes() for p in both) == sorted(p.numpy().tobytes() for p in pixels)
    np.testing.assert_allclose(read_manifest(tmp_path / "both").latents.std, read_manifest(folder).latents.std)


# -- what is wrong -----------------------------------------------------------------------------------------------------


def replace_member(folder: Path, record: int, payload: bytes) -> None:
    """Put another member of the same length or less, padded, in the place of a record's picture, and index it."""
    row = np.load(folder / INDEX_NAME)[record]
    assert len(payload) <= row["latent_length"]
    overwrite(folder, record, 0, payload + bytes(int(row["latent_length"]) - len(payload)))
    fix_checksum(folder, record)


def test_damaged_pictures_are_listed_and_counted(pictures: Path, make_recipe: MakeRecipe) -> None:
    reasons = {}
    for coding in CODINGS:
        recipe = make_recipe(pictures, codec=uint8(coding), output=f"{pictures}-{coding}")
        encode(recipe, progress=False)
        folder = Path(recipe.output)
        pixels = read(folder)[0]
        flip_bit(folder, 2)
        smaller = np.asarray(pixels[3, :, :-1])
        replace_member(folder, 3, pack_picture(smaller, coding))  # type: ignore[arg-type]
        replace_member(folder, 4, to_npy(np.zeros((3, 4, 4), np.float16)))
        if coding == "png":
            replace_member(folder, 5, pack_picture(np.asarray(pixels[5]), "png")[:-200])
        manifest = read_manifest(folder)
        dataset = LatentDataset(folder, manifest, Normalization.of(manifest, "codec"), bad_samples="skip")
        records = np.arange(len(dataset))
        samples = dataset.read(records, records, seed=0, flip_probability=0.5)
        bad = [2, 3, 4, 5] if coding == "png" else [2, 3, 4]
        assert sorted(samples.bad) == bad
        assert not samples.latents[bad].any()
        reasons[coding] = [samples.bad[row].reason for row in bad]
        with pytest.raises(InputError, match="its checksum is wrong"):
            LatentDataset.open(folder, "codec").read(records, records, seed=0, flip_probability=0.0)
        report = verify(folder)
        assert report.exit_code == 1
        what = "is not a uint8 array of shape" if coding == "raw" else "is not a PNG as pomscale writes it of shape"
        # The bit that is flipped lies in a raw picture's pixels, and at the end of a PNG file.
        assert sum(what in problem for problem in report.problems) == (len(bad) - 1 if coding == "raw" else len(bad))
    assert all("its checksum is wrong" in lines[0] for lines in reasons.values())
    for line in reasons["raw"][1:]:
        assert re.search(r"record \d, .*latent.npy: it is not a uint8 array of shape \(3, 16, 16\)\. .*repair", line)
    for line in reasons["png"][1:]:
        assert re.search(
            r"record \d, .*\.png: it is not a PNG as pomscale writes it of shape \(3, 16, 16\)\. run", line
        )


def test_items_that_are_no_pictures_are_skipped_and_listed(pictures: Path, make_recipe: MakeRecipe) -> None:
    (pictures / "cat" / "00.png").write_bytes((pictures / "cat" / "00.png").read_bytes()[:100])
    Image.new("L", (90_000_000 // 256, 1)).save(pictures / "cat" / "01.png")
    recipe = make_recipe(pictures, codec=uint8("png"), transform={"size": 256, "filter": "adm"})
    report = encode(recipe, progress=False)
    assert (only(report).num_samples, only(report).num_failures, report.exit_code) == (19, 2, 3)
    listed = (Path(recipe.output) / "failures.jsonl").read_text()
    assert "too long a strip" in listed


def test_a_mixture_of_pixels_and_latents_is_refused(pictures: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipes = {
        "pixels": make_recipe(pictures, codec=uint8("raw"), output=str(tmp_path / "pixels")),
        "png": make_recipe(pictures, codec=uint8("png"), output=str(tmp_path / "png")),
        "latents": make_recipe(pictures, codec={"name": "pixel", "block": 1}, output=str(tmp_path / "latents")),
    }
    for recipe in recipes.values():
        encode(recipe, progress=False)

    def opened(*names: str) -> Mixture:
        data = DataConfig.model_validate({"mixture": [{"path": recipes[name].output} for name in names]})
        return Mixture.open(data, seed=0, global_batch=8, read_text=False)

    for names in (("pixels", "latents"), ("latents", "png")):
        with pytest.raises(InputError, match=r"data.mixture: .* one holds pixels \(uint8\) and the other latents"):
            opened(*names)
    batch = opened("pixels", "png").read(np.arange(8))
    assert batch.latents.dtype == torch.uint8
    assert batch.latents.shape == (8, 3, 16, 16)


def test_a_manifest_that_contradicts_itself_is_refused(pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(pictures, codec=uint8("png"))
    encode(recipe, progress=False)
    change_manifest(Path(recipe.output), "latent", "dtype", value="float16")
    with pytest.raises(InputError, match="coding png is for uint8"):
        read_manifest(recipe.output)


# -- copies ------------------------------------------------------------------------------------------------------------

SIDE, BATCH = 96, 8
PICTURE_BYTES = 3 * SIDE * SIDE


@pytest.fixture(params=CODINGS)
def large(request: pytest.FixtureRequest, tmp_path: Path, make_recipe: MakeRecipe) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "large" / "x").mkdir(parents=True)
    for number in range(BATCH):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "large" / "x" / f"{number}.png")
    recipe = make_recipe(tmp_path / "large", codec=uint8(request.param), transform={"size": SIDE, "flip": True})
    encode(recipe, progress=False)
    return Path(recipe.output)


def test_a_byte_is_copied_once_from_the_page_cache_to_the_batch(large: Path) -> None:
    """Every allocation is traced: torch's by its profiler, those of Python, NumPy and isal by tracemalloc."""
    manifest = read_manifest(large)
    dataset = LatentDataset(large, manifest, Normalization.of(manifest, "codec"))
    records = np.arange(BATCH)
    dataset.read(records, records, seed=0, flip_probability=0.5)  # what is cached is there now
    shard = dataset._reader.files.open(0)
    address = shard.__array_interface__["data"][0]
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".tar")]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    assert any(begin <= address < end for begin, end in spans)  # shards are read where the page cache has them
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        tracemalloc.start()
        samples = dataset.read(records, records, seed=0, flip_probability=0.5)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert profiler.profiler is not None
    sizes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    assert [size for size in sizes if size >= PICTURE_BYTES] == [BATCH * PICTURE_BYTES]  # the batch, and nothing else
    # Raw, no memory of the size of a picture is ever there; PNG inflates one at a time.
    inflated = PICTURE_BYTES if manifest.latents.coding == "png" else 0
    assert peak < inflated + 0.9 * PICTURE_BYTES
    assert samples.latents.numel() == BATCH * PICTURE_BYTES


def test_the_loader_hands_the_batch_on_as_it_is(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_pictures, addresses = LatentDataset.read, []

    def noted(self: LatentDataset, *args: object, **options: object) -> object:
        samples = read_pictures(self, *args, **options)  # type: ignore[arg-type]
        addresses.append(samples.latents.data_ptr())
        return samples

    monkeypatch.setattr(LatentDataset, "read", noted)
    mixture = Mixture.open(DataConfig(path=str(large)), seed=0, global_batch=BATCH, read_text=False)
    options = {"micro_batch": None, "rank": 0, "world_size": 1, "start_position": 0}
    loader: Loader[MicroBatch] = Loader(mixture, ahead=ReadAhead(1, 1), finish=lambda batch: batch, **options)  # type: ignore[arg-type]
    with loader:
        batches = [next(loader) for _ in range(3)]
    assert [batch.latents.data_ptr() for batch in batches] == addresses[:3]


def test_streamed_shards_hold_the_same(large: Path) -> None:
    assert torch.equal(read(large, 0.5, reading="streamed")[0], read(large, 0.5)[0])


def test_what_is_stored_is_what_pillow_would_store(large: Path) -> None:
    if read_manifest(large).latents.coding == "raw":
        found = [np.load(io.BytesIO(member)) for member in shard_members(large, ".latent.npy")]
    else:
        found = [
            np.asarray(Image.open(io.BytesIO(member))).transpose(2, 0, 1) for member in shard_members(large, ".png")
        ]
    np.testing.assert_array_equal(read(large)[0], np.stack(found))
