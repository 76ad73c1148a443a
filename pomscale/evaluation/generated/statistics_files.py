"""Files of reference statistics: ours, and those of ADM, JiT, pytorch-fid and torch-fidelity.

All are means and covariances of features. Ours is an npz with the arrays of ADM's (`mu` and `sigma` of pooled
features, `mu_s` and `sigma_s` of spatial ones), so that other tools read it, and with `header`, a JSON text that says
which extractor made them, from how many samples, and with which settings.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write, check_suffix
from pomscale.codecs.extractors.base import FeatureName
from pomscale.metrics.moments import Gaussian

_FORMAT, _VERSION = "pomscale statistics", 1
_ARRAYS: dict[FeatureName, tuple[str, str]] = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_HEADER = "header"

# Names that unpickling numpy arrays needs: torch-fidelity's cache of statistics is a torch file of them.
_NUMPY_GLOBALS: list[Any] = [
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # type: ignore[attr-defined]
    np.ndarray,
    np.dtype,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
]


@dataclass(frozen=True)
class Statistics:
    """Moments of a set of features, and where they are from.

    Attributes:
        gaussians: Mean, covariance and count by feature; counts are None if the file does not tell them.
        extractor: Identity of the extractor, or None for files of other tools, which do not tell it.
        settings: All that made them, as `write_statistics` was given it; empty for files of other tools.
        path: The file.
        sha256: Hash (hex) of the whole file.
    """

    gaussians: dict[FeatureName, Gaussian]
    extractor: str | None
    settings: dict[str, Any]
    path: Path
    sha256: str

    def check(self, extractor: str, dims: Mapping[FeatureName, int], names: tuple[FeatureName, ...]) -> None:
        """Check that features of an extractor can be compared with the statistics.

        Args:
            extractor: Identity of the extractor.
            dims: Its features with their widths.
            names: The features that are compared.

        Raises:
            InputError: The extractor is another one, a feature is missing, or its width differs.
        """
        if self.extractor is not None and self.extractor != extractor:
            raise InputError(
                f"{self.path}: these statistics are of another extractor, {self.extractor[:12]}, and not of "
                f"{extractor[:12]}, which is asked for; use that one, or make the statistics with this one"
            )
        for name in names:
            if name not in self.gaussians:
                raise InputError(
                    f"{self.path}: there are no statistics of {name} features in it, only of "
                    f"{', '.join(self.gaussians)}; leave out the metrics that need them"
                )
            width = self.gaussians[name].width
            if width != dims[name]:
                raise InputError(
                    f"{self.path}: the statistics are of {width} {name} features, and the extractor has "
                    f"{dims[name]}; name the extractor that they were made with"
                )


def holds_statistics(path: Path) -> bool:
    """Return whether a file has a mean and a covariance by its names of arrays; ADM's may have pictures, too.

    Raises InputError if an .npz cannot be opened.
    """
    if path.suffix == ".pt":
        return True
    return path.suffix == ".npz" and "mu" in _array_names(path)


def read_statistics(path: Path) -> Statistics:
    """Read statistics of ours, of ADM, of JiT and pytorch-fid (.npz), or of torch-fidelity's cache (.pt).

    Pickled objects are never run.

    Raises:
        InputError: The file is missing, damaged, of another kind, or its numbers are no mean and covariance.
    """
    digest = _hash(path)
    arrays, others = (_read_torch(path), []) if path.suffix == ".pt" else _read_npz(path)
    header = _parse_header(path, arrays[_HEADER]) if _HEADER in arrays else {}
    counts = header.get("counts", {})
    gaussians: dict[FeatureName, Gaussian] = {}
    for name, (mean, covariance) in _ARRAYS.items():
        if mean in arrays and covariance in arrays:
            try:
                gaussians[name] = Gaussian(arrays[mean], arrays[covariance], counts.get(name))
            except ValueError as error:
                raise InputError(f"{path}: {mean} and {covariance} are no statistics: {error}") from error
    if "pooled" not in gaussians:
        found = ", ".join(sorted([*arrays, *others])) or "nothing"
        raise InputError(f"{path}: there is no mean and covariance (mu, sigma) in it, but {found}")
    return Statistics(gaussians, header.get("extractor"), header.get("settings", {}), path, digest)


def write_statistics(
    path: Path, gaussians: Mapping[FeatureName, Gaussian], extractor: str, settings: Mapping[str, Any]
) -> str:
    """Write statistics, pooled ones among them, and return the file's sha256; equal content gives equal bytes.

    Args:
        path: An .npz file.
        gaussians: Mean, covariance and count by feature, "pooled" or "spatial".
        extractor: Identity of the extractor.
        settings: All that made the statistics, as JSON can hold it.

    Raises:
        InputError: The path ends otherwise.
        ValueError: There are no pooled features, or there are others than these two.
    """
    check_suffix(path, ".npz")
    if "pooled" not in gaussians or not gaussians.keys() <= _ARRAYS.keys():
        raise ValueError(f"statistics are of pooled and spatial features, and not of {', '.join(gaussians)}")
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "extractor": extractor,
        "counts": {name: gaussian.count for name, gaussian in gaussians.items()},
        "settings": dict(settings),
    }
    arrays = {_HEADER: np.array(json.dumps(header, sort_keys=True))}
    for name, gaussian in gaussians.items():
        mean, covariance = _ARRAYS[name]
        arrays |= {mean: gaussian.mean, covariance: gaussian.covariance}
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    with atomic_write(path) as file:
        file.write(stream.getbuffer())
    return hashlib.sha256(stream.getbuffer()).hexdigest()


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _array_names(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as .npz: {error}; copy it again") from error


def _read_npz(path: Path) -> tuple[dict[str, npt.NDArray[Any]], list[str]]:
    """Return the arrays of statistics, and the names of others (ADM's pictures), which are not read."""
    names = _array_names(path)
    wanted = names & {_HEADER, *(name for pair in _ARRAYS.values() for name in pair)}
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in wanted}, sorted(names - wanted)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise InputError(
            f"{path}: cannot be read as .npz without running pickled code: {error}; copy or make it again"
        ) from error


def _read_torch(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with torch.serialization.safe_globals(_NUMPY_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: is no statistics file of torch-fidelity: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(array, np.ndarray) for array in content.values()):
        raise InputError(f"{path}: is no statistics file of torch-fidelity, which holds arrays mu and sigma")
    return content


def _parse_header(path: Path, array: npt.NDArray[Any]) -> dict[str, Any]:
    try:
        header = json.loads(str(array))
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise InputError(f"{path}: its header is none of pomscale's statistics; make the file again")
    if header.get("version") != _VERSION:
        raise InputError(
            f"{path}: is of version {header.get('version')}, and this pomscale reads {_VERSION}; update it"
        )
    types = {"extractor": str, "counts": dict, "settings": dict}
    if not all(isinstance(header.get(key), kind) for key, kind in types.items()) or not all(
        count is None or type(count) is int for count in header["counts"].values()
    ):
        raise InputError(f"{path}: its header lacks extractor, counts or settings; make the file again")
    return header
