"""Pictures of every kind of file come out with the same pixels; what cannot be measured is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pomscale.base.errors import InputError
from pomscale.checkpoint.store import find_checkpoint
from pomscale.evaluation.generated.opening import Opening, open_pictures, open_reference
from pomscale.evaluation.generated.picture_files import Fit
from pomscale.evaluation.generated.picture_sets import PictureSet, to_pixels
from pomscale.media.pictures import fit_picture
from support.encoding import read_all
from support.generated_pictures import make_pixels, write_folder, write_tar
from support.synthetic_dataset import write_dataset

COUNT = 11


def read(pictures: PictureSet, batch: int = 4) -> np.ndarray:
    """All pictures (n, h, w, c), read in parts of 5."""
    batches = [
        one
        for begin in range(0, COUNT, 5)
        for one in pictures.batches(begin, min(begin + 5, pictures.num_pictures), batch)
    ]
    assert [number for one in batches for number in one.numbers] == list(range(pictures.num_pictures))
    return torch.cat([one.pixels for one in batches]).numpy().transpose(0, 2, 3, 1)


def adm(folder: Path, pixels: np.ndarray) -> Path:
    np.savez(folder / "adm.npz", pixels, np.arange(len(pixels)))
    return folder / "adm.npz"


def ours(folder: Path, pixels: np.ndarray) -> Path:
    np.savez_compressed(
        folder / "ours.npz", images=pixels, classes=np.arange(len(pixels)), seeds=np.arange(len(pixels))
    )
    return folder / "ours.npz"


KINDS: dict[str, Callable[[Path, np.ndarray], Path | str]] = {
    "adm": adm,
    "ours": ours,
    "folder": lambda folder, pixels: write_folder(folder / "pictures", pixels),
    "tar": lambda folder, pixels: write_tar(folder / "one.tar", pixels),
    "folder of tars": lambda folder, pixels: (
        (
            write_tar(folder / "tars" / "0.tar", pixels[:6]),
            write_tar(folder / "tars" / "1.tar", pixels[6:]),
        )[0].parent
    ),
    "pattern": lambda folder, pixels: (
        write_tar(folder / "p-0.tar", pixels[:6]),
        write_tar(folder / "p-1.tar", pixels[6:]),
        f"{folder}/p-{{0..1}}.tar",
    )[2],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_the_files(tmp_path: Path, kind: str, channels: int) -> None:
    pixels = make_pixels(COUNT, (8, 6) if channels == 1 else (8, 6, 3))
    pictures = open_pictures(str(KINDS[kind](tmp_path, pixels)), Opening())
    assert (pictures.num_pictures, pictures.num_channels, pictures.size) == (COUNT, channels, (8, 6))
    np.testing.assert_array_equal(read(pictures), pixels.reshape(COUNT, 8, 6, channels))


@pytest.mark.parametrize("kind", ["adm", "ours", "folder", "tar"])
def test_fewer_pictures_are_taken_at_equal_distances(tmp_path: Path, kind: str) -> None:
    pixels = make_pixels(COUNT)
    where = str(KINDS[kind](tmp_path, pixels))
    pictures = open_pictures(where, Opening(num=4))
    (batch,) = pictures.batches(0, 4, 8)
    np.testing.assert_array_equal(batch.pixels[:, 0].numpy(), pixels[[0, 2, 5, 8]])
    with pytest.raises(InputError, match="12 pictures are asked for, and 11 are here"):
        open_pictures(where, Opening(num=12))


def test_labels_of_an_npz_go_with_the_pictures(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", make_pixels(4), np.array([3, 1, 2, 0]))
    (batch,) = open_pictures(str(tmp_path / "a.npz"), Opening()).batches(1, 3, 8)
    assert batch.labels == [1, 2]
    np.savez(tmp_path / "b.npz", make_pixels(4), np.array([0.5, 1, 2, 0]))
    with pytest.raises(InputError, match=r"arr_1 is float64 of shape \(4,\), not one class id per picture"):
        open_pictures(str(tmp_path / "b.npz"), Opening())


def test_latents_are_decoded_by_their_codec(digits: Path) -> None:
    pictures = open_pictures(str(digits / "latents" / "train"), Opening(num=7))
    assert (pictures.num_channels, pictures.size) == (1, (8, 8))
    (batch,) = pictures.batches(0, 7, 8)
    files = open_pictures(str(digits / "digits" / "train"), Opening())
    known = {one.tobytes() for whole in files.batches(0, files.num_pictures, 64) for one in whole.pixels.numpy()}
    assert all(one.tobytes() in known for one in batch.pixels.numpy())
    _, labels = read_all(digits / "latents" / "train")
    assert batch.labels == [int(labels[number * len(labels) // 7]) for number in range(7)]


def test_captions_of_tars(tmp_path: Path) -> None:
    tar = str(write_tar(tmp_path / "a.tar", make_pixels(3), ["a cat", "a dog", "a fox"]))
    assert not open_pictures(tar, Opening()).has_captions
    pictures = open_pictures(tar, Opening(with_captions=True))
    (batch,) = pictures.batches(1, 3, 8)
    assert pictures.has_captions
    assert batch.captions == ["a dog", "a fox"]


def test_pictures_are_fitted_as_the_encoder_does(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", make_pixels(2, (20, 30, 3)))
    write_folder(tmp_path / "a" / "z", make_pixels(1, (25, 16, 3)))
    fit = Fit((8, 8), "area")
    (batch,) = open_pictures(str(folder), Opening(fit=fit)).batches(0, 3, 8)
    for path, one in zip(sorted(folder.rglob("*.png")), batch.pixels.numpy(), strict=True):
        np.testing.assert_array_equal(one.transpose(1, 2, 0), fit_picture(Image.open(path), (8, 8), "area"))


def test_sizes_that_differ_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", make_pixels(2))
    write_folder(folder / "z", make_pixels(1, (9, 7)))
    pictures = open_pictures(str(folder), Opening())
    with pytest.raises(InputError, match=r"z/00/0000.png has 9x7 pixels, and the first picture 8x8; .* --fit 8"):
        list(pictures.batches(0, 3, 2))


def test_pictures_that_cannot_be_read_are_listed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", make_pixels(6))
    (folder / "00" / "0001.png").write_bytes(b"damaged")
    (folder / "00" / "0003.png").write_bytes((folder / "00" / "0002.png").read_bytes()[:-30])
    pictures = open_pictures(str(folder), Opening())
    (folder / "01" / "0005.png").unlink()
    batches = list(pictures.batches(0, 6, 4))
    assert [one.numbers for one in batches] == [[0, 2], [4]]
    failures = [failure for one in batches for failure in one.failures]
    assert [failure.where for failure in failures] == ["00/0001.png", "00/0003.png", "01/0005.png"]
    assert failures[0].reason == "no PNG, JPEG or WebP picture"
    assert failures[2].reason == "is gone since it was listed"


def test_a_colour_picture_among_grey_ones_is_no_grey_picture(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", make_pixels(20))
    Image.fromarray(make_pixels(1, (8, 8, 3))[0]).save(folder / "z.png")
    pictures = open_pictures(str(folder), Opening())
    failures = [failure for one in pictures.batches(0, 21, 8) for failure in one.failures]
    assert pictures.num_channels == 1
    assert [failure.where for failure in failures] == ["z.png"]


def test_grey_pictures_among_colours_are_converted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", make_pixels(3, (8, 8, 3)))
    grey = make_pixels(1)[0]
    Image.fromarray(grey).save(folder / "00" / "0000.png")
    (batch,) = open_pictures(str(folder), Opening()).batches(0, 3, 8)
    np.testing.assert_array_equal(batch.pixels[0].numpy(), np.stack([grey] * 3))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"arr_0": make_pixels(3).astype(np.float32)},
            r"arr_0 is float32 of shape \(3, 8, 8\), and pictures are uint8",
        ),
        ({"arr_0": make_pixels(3, (8, 8, 2))}, r"shape \(3, 8, 8, 2\)"),
        ({"arr_0": make_pixels(3)[:0]}, r"shape \(0, 8, 8\)"),
        ({"latents": make_pixels(3)}, "has no pictures: arrays latents, and pictures are called arr_0 or images"),
    ],
)
def test_an_npz_of_something_else(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        open_pictures(str(tmp_path / "a.npz"), Opening())


def test_an_npz_that_is_cut_off(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", make_pixels(3))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-40])
    with pytest.raises(InputError, match=r"a.npz: cannot be read as an npz file"):
        open_pictures(str(tmp_path / "a.npz"), Opening())


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "some.txt").touch()
    for where, message in (
        ("nowhere", "there is no such file or folder; give a run"),
        ("empty", r"no picture \(.png, .jpg, .jpeg, .webp\) is here"),
        ("no.tar", "there is no file"),
        ("some.txt", "is no file of these; give a run"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            open_pictures(str(tmp_path / where), Opening())
        assert "source.path" not in str(raised.value)


def test_a_folder_of_checkpoints_or_of_runs_says_what_to_type(tmp_path: Path) -> None:
    checkpoint = tmp_path / "runs" / "one" / "checkpoints" / "samples-000000000064"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").touch()
    message = f"{checkpoint.parent}: a folder of checkpoints; give one of them, such as {checkpoint}, or the run itself"
    with pytest.raises(InputError, match=message):
        open_pictures(str(checkpoint.parent), Opening())
    with pytest.raises(InputError, match=message):
        find_checkpoint(checkpoint.parent)  # as every command that takes a model
    (tmp_path / "runs" / "one" / "recipe.yaml").touch()
    write_folder(tmp_path / "runs" / "one" / "samples", make_pixels(1))
    with pytest.raises(InputError, match=f"runs: a folder of runs; give one of them, such as {tmp_path}/runs/one"):
        open_pictures(str(tmp_path / "runs"), Opening())


def test_a_folder_with_clips_or_other_pictures_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", make_pixels(1))
    for name in ("b.mp4", "c.BMP", "d.bmp", ".e.gif", "notes.txt"):
        (folder / name).write_bytes(b"")
    message = rf"^{folder}: there are files that are not measured \(2 .bmp, 1 .mp4\), only .png, .jpg, "
    with pytest.raises(InputError, match=message):
        open_pictures(str(folder), Opening())


def test_a_dataset_of_several_sizes_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [3], text=True, latents=False)
    with pytest.raises(InputError, match="has text embeddings and no latents"):
        open_pictures(str(tmp_path / "a"), Opening())


def test_statistics_may_have_pictures_beside_them(tmp_path: Path) -> None:
    mean, covariance = np.zeros(3), np.eye(3)
    np.savez(tmp_path / "adm.npz", arr_0=make_pixels(3), mu=mean, sigma=covariance)
    reference = open_reference(str(tmp_path / "adm.npz"), Opening())
    assert reference.pictures is not None
    assert reference.statistics is not None
    np.savez(tmp_path / "jit.npz", mu=mean, sigma=covariance)
    reference = open_reference(str(tmp_path / "jit.npz"), Opening())
    assert reference.pictures is None
    assert reference.statistics is not None
    assert open_reference(str(write_folder(tmp_path / "a", make_pixels(1))), Opening()).statistics is None
    assert open_reference(None, Opening()) == (None, None)


def test_values_are_rounded_to_the_nearest_byte() -> None:
    values = torch.tensor([-0.1, 0.0, 0.499 / 255, 0.501 / 255, 254.4 / 255, 254.6 / 255, 1.0, 1.2])
    assert to_pixels("here", values).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]
    every = torch.arange(256) / 255
    assert to_pixels("here", every).tolist() == list(range(256))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_no_black_pictures(value: float) -> None:
    with pytest.raises(InputError, match="here: decoded pictures have values that are not finite"):
        to_pixels("here", torch.tensor([0.5, value]))


def test_a_folder_of_tars_may_have_any_name(tmp_path: Path) -> None:
    pixels = make_pixels(6)
    folder = tmp_path / "a {1,2} [b]*"
    write_tar(folder / "one.tar", pixels[:4])
    write_tar(folder / "two.tar", pixels[4:])
    (folder / "._two.tar").write_bytes(b"")
    np.testing.assert_array_equal(read(open_pictures(str(folder), Opening()))[..., 0], pixels)
