"""Statistics files: ours and other tools' are read, and what is damaged, foreign or unfit is refused in one line."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pomscale.base.errors import InputError
from pomscale.evaluation.generated.statistics_files import holds_statistics, read_statistics, write_statistics
from pomscale.metrics.moments import Gaussian

MEAN, COVARIANCE = np.arange(3.0), np.diag([1.0, 2.0, 3.0]) + 0.25
POOLED, SPATIAL = Gaussian(MEAN, COVARIANCE, 40), Gaussian(np.ones(2), np.eye(2), 40)
HEADER = '{"format": "pomscale statistics", "version": 1, "extractor": "a", "settings": {}, "counts": %s}'
SETTINGS = {"reference": "data", "size": [32, 32]}


def same(one: Gaussian, two: Gaussian) -> bool:
    return (
        np.array_equal(one.mean, two.mean) and np.array_equal(one.covariance, two.covariance) and one.count == two.count
    )


# --- ours ----------------------------------------------------------------------------------------------------------


def test_ours_come_back_whole_with_the_hash_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    digest = write_statistics(path, {"pooled": POOLED, "spatial": SPATIAL}, "a" * 64, SETTINGS)
    read = read_statistics(path)
    assert same(read.gaussians["pooled"], POOLED)
    assert same(read.gaussians["spatial"], SPATIAL)
    assert (read.extractor, read.settings, read.path) == ("a" * 64, SETTINGS, path)
    assert read.sha256 == digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert holds_statistics(path)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    digests = {
        write_statistics(tmp_path / name, {"pooled": POOLED}, "a" * 64, settings)
        for name, settings in (("1.npz", SETTINGS), ("2.npz", dict(reversed(SETTINGS.items()))))
    }
    assert len(digests) == 1


def test_other_tools_read_ours(tmp_path: Path) -> None:
    """ADM and its kin take mu, sigma, mu_s and sigma_s by numpy.load, which runs no pickles by default."""
    path = tmp_path / "reference.npz"
    write_statistics(path, {"pooled": POOLED, "spatial": SPATIAL}, "a" * 64, SETTINGS)
    with np.load(path) as archive:
        assert np.array_equal(archive["mu"], MEAN)
        assert np.array_equal(archive["sigma"], COVARIANCE)
        assert np.array_equal(archive["sigma_s"], np.eye(2))


def test_only_pooled_and_spatial_features_have_a_name_in_the_file(tmp_path: Path) -> None:
    for gaussians in ({"spatial": SPATIAL}, {"pooled": POOLED, "logits": SPATIAL}):
        with pytest.raises(ValueError, match="pooled and spatial features, and not of"):
            write_statistics(tmp_path / "a.npz", gaussians, "a", {})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"written as \.npz"):
        write_statistics(tmp_path / "a.pt", {"pooled": POOLED}, "a", {})


# --- other tools' --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(np.float64, np.float64), (np.float32, np.float64), (np.float32, np.float32)])
def test_adms_have_pooled_and_spatial_statistics_and_perhaps_pictures(tmp_path: Path, dtypes: tuple[Any, Any]) -> None:
    """Float32 means beside float64 covariances are numpy's answer to float32 features."""
    path = tmp_path / "VIRTUAL.npz"
    pictures = np.zeros((2, 4, 4, 3), np.uint8)
    mean, covariance = MEAN.astype(dtypes[0]), COVARIANCE.astype(dtypes[1])
    np.savez(path, arr_0=pictures, mu=mean, sigma=covariance, mu_s=np.ones(2), sigma_s=np.eye(2))
    read = read_statistics(path)
    assert holds_statistics(path)
    assert same(read.gaussians["pooled"], Gaussian(MEAN, COVARIANCE))
    assert same(read.gaussians["spatial"], Gaussian(np.ones(2), np.eye(2)))
    assert (read.extractor, read.settings) == (None, {})


def test_jits_and_pytorch_fids_have_mu_and_sigma(tmp_path: Path) -> None:
    for name, save in (("jit.npz", np.savez), ("fid.npz", np.savez_compressed)):
        save(tmp_path / name, mu=MEAN, sigma=COVARIANCE)
        assert same(read_statistics(tmp_path / name).gaussians["pooled"], Gaussian(MEAN, COVARIANCE))


def test_torch_fidelitys_cache_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data-inception-v3-compat-stat-fid-2048.pt"
    torch.save({"mu": MEAN.astype(np.float32), "sigma": COVARIANCE}, path)
    assert holds_statistics(path)
    assert same(read_statistics(path).gaussians["pooled"], Gaussian(MEAN, COVARIANCE))


def test_pictures_alone_are_no_statistics(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, np.zeros((2, 4, 4, 3), np.uint8))
    assert not holds_statistics(path)
    assert not holds_statistics(tmp_path / "folder")
    with pytest.raises(
        InputError, match=r"samples\.npz: there is no mean and covariance \(mu, sigma\) in it, but arr_0"
    ):
        read_statistics(path)


# --- what is refused -----------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_pickles_are_refused_and_not_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=np.array([Bomb()], object), sigma=COVARIANCE)
    torch.save({"mu": Bomb(), "sigma": COVARIANCE}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"mu": Bomb()}))
    for name, message in (("a.npz", "without running pickled code"), ("a.pt", "torch-fidelity"), ("b.pt", "torch-fid")):
        with pytest.raises(InputError, match=f"{name}: .*{message}"):
            read_statistics(tmp_path / name)
    assert not Path("exploded").exists()


def test_damage_is_found_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    write_statistics(path, {"pooled": POOLED}, "a" * 64, SETTINGS)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        places = [info.header_offset + 200 for info in archive.infolist()]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"reference\.npz: cannot be read as \.npz"):
            read_statistics(path)
    for size in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"reference\.npz: cannot be read as \.npz"):
            read_statistics(path)
        with pytest.raises(InputError, match=r"reference\.npz: cannot be read as \.npz"):
            holds_statistics(path)


@pytest.mark.parametrize("name", ["none.npz", "none.pt"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: cannot be read"):
        read_statistics(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": MEAN, "sigma": np.eye(2)}, "mu and sigma are no statistics: .* do not fit"),
        ({"mu": MEAN, "sigma": COVARIANCE[None]}, "do not fit"),
        ({"mu": MEAN * np.nan, "sigma": COVARIANCE}, "not finite"),
        ({"mu": MEAN, "sigma": np.triu(COVARIANCE)}, "not symmetric"),
        ({"mu": MEAN.astype(int), "sigma": COVARIANCE}, "one is int64"),
        ({"mu": MEAN, "sigma": COVARIANCE, "mu_s": MEAN, "sigma_s": -np.eye(2)}, "mu_s and sigma_s are no statistics"),
        ({"mu": MEAN, "cov": COVARIANCE}, r"no mean and covariance \(mu, sigma\) in it, but cov, mu"),
        ({"mu": MEAN, "sigma": COVARIANCE, "header": np.array("{}")}, "header is none of pomscale's"),
        ({"mu": MEAN, "sigma": COVARIANCE, "header": np.array("}")}, "header is none of pomscale's"),
        (
            {"mu": MEAN, "sigma": COVARIANCE, "header": np.array('{"format": "pomscale statistics", "version": 2}')},
            "is of version 2, and this pomscale reads 1",
        ),
        ({"mu": MEAN, "sigma": COVARIANCE, "header": np.array(HEADER % "[4]")}, "header lacks extractor, counts"),
        ({"mu": MEAN, "sigma": COVARIANCE, "header": np.array(HEADER % '{"pooled": "4"}')}, "header lacks extractor"),
        ({"mu": MEAN, "sigma": COVARIANCE, "header": np.array(HEADER % '{"pooled": 1}')}, "at least 2 samples"),
    ],
)
def test_numbers_that_are_no_statistics_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=rf"a\.npz: .*{message}"):
        read_statistics(tmp_path / "a.npz")


def test_a_torch_file_of_something_else_is_refused(tmp_path: Path) -> None:
    for content in ([1, 2], {"weight": torch.zeros(2)}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(InputError, match=r"a\.pt: is no statistics file of torch-fidelity"):
            read_statistics(tmp_path / "a.pt")


def test_statistics_of_another_extractor_width_or_feature_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    write_statistics(path, {"pooled": POOLED}, "a" * 64, SETTINGS)
    read = read_statistics(path)
    read.check("a" * 64, {"pooled": 3, "spatial": 2}, ("pooled",))
    with pytest.raises(InputError, match=r"reference\.npz: these statistics are of another extractor, aaaaaaaaaaaa, "):
        read.check("b" * 64, {"pooled": 3}, ("pooled",))
    with pytest.raises(InputError, match="no statistics of spatial features in it, only of pooled"):
        read.check("a" * 64, {"pooled": 3, "spatial": 2}, ("pooled", "spatial"))
    np.savez(path, mu=MEAN, sigma=COVARIANCE)
    foreign = read_statistics(path)
    foreign.check("b" * 64, {"pooled": 3}, ("pooled",))
    with pytest.raises(InputError, match="are of 3 pooled features, and the extractor has 2048"):
        foreign.check("b" * 64, {"pooled": 2048}, ("pooled",))
