"""Functions that tests of the encoder share."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipelines.encode.encode import Encoded, EncodeReport
from pomscale.data.dataset import LatentDataset
from pomscale.data.normalize import normalize
from pomscale.shards.index import split_member_name
from pomscale.shards.schema import read_manifest


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output by name, without the log of each task."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "task-" not in str(path)
    }


def only(report: EncodeReport) -> Encoded:
    """The one dataset that an encode finished."""
    (dataset,) = report.datasets
    return dataset


def shard_members(folder: Path, suffix: str) -> list[bytes]:
    """Contents of the members with a suffix, in the order of the index."""
    found = []
    for shard in read_manifest(folder).shards:
        with tarfile.open(folder / shard.name) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                if split_member_name(member.name)[1] == suffix and stream is not None:
                    found.append(stream.read())
    return found


def read_all(
    folder: Path, normalization: Literal["codec", "dataset"] = "codec", *, flip: bool = False, first_position: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Latents and labels of every record, through the loader's own reader."""
    dataset = LatentDataset.open(folder, normalization)
    records = np.arange(len(dataset))
    samples = dataset.read(records, records + first_position, seed=0, flip_probability=float(flip))
    return np.asarray(normalize(samples.latents, dataset.normalization)), np.asarray(samples.labels)
