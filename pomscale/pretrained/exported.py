"""An exported folder: weights to use or to publish, without the state that only training needs.

    config.json             the card, the provenance of the weights, versions, CRC-32s
    NAME.safetensors        one file per set of weights; NAME is "model" (as last trained) or the name of an average

The folder appears under its name when all of it is on disk.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import make_folder, sync_folder, write_text
from pomscale.pretrained.safetensors_file import read_safetensors, write_safetensors

CONFIG = "config.json"
_FORMAT, _FORMAT_VERSION = "pomscale-export", 1
_GROUP_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Exported:
    """An exported folder that can be read; `meta` holds card, provenance and versions as they were written."""

    folder: Path
    meta: dict[str, Any]

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the sets of weights."""
        return tuple(self.meta["weights"])

    def read(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` in place with those of a set. Raise InputError if its file is missing or damaged."""
        read_safetensors(self.folder / f"{name}.safetensors", tensors, self.meta["weights"][name]["crc32"])


def is_exported(path: Path) -> bool:
    """Tell whether `path` is an exported folder."""
    return (path / CONFIG).is_file()


def read_exported(folder: Path) -> Exported:
    """Open an exported folder. Raise InputError for one that another program, or a later pomscale, has written."""
    try:
        meta = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / CONFIG}: damaged: {error}; copy or export the folder again") from error
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise InputError(f"{folder}: no weights of pomscale; give a folder that `pomscale export` or `import` wrote")
    if meta["format_version"] != _FORMAT_VERSION:
        raise InputError(
            f"{folder}: format version {meta['format_version']}, this pomscale reads {_FORMAT_VERSION}; "
            f"use pomscale {meta['versions']['pomscale']}"
        )
    return Exported(folder, meta)


def write_exported(
    out: Path,
    meta: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    sets: Mapping[str, Iterable[Tensor]],
    dtype: torch.dtype,
) -> None:
    """Make the exported folder `out`.

    Args:
        out: The folder to make.
        meta: JSON with "card", "provenance" and "versions".
        shapes: Shapes of the parameters by name.
        sets: Tensors of each set in the order of `shapes`.
        dtype: torch.float32 or torch.bfloat16.

    Raises:
        InputError: Something exists at `out` already.
        PomscaleError: The disk is full.
    """
    with _new_folder(out) as folder:
        weights = {}
        for name, tensors in sets.items():
            crc32s = write_safetensors(folder / f"{name}.safetensors", shapes, tensors, dtype)
            weights[name] = {"dtype": str(dtype).removeprefix("torch."), "crc32": crc32s}
        config = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **meta, "weights": weights}
        write_text(folder / CONFIG, json.dumps(config, indent=1))


def groups(shapes: Mapping[str, Sequence[int]]) -> Iterator[dict[str, Sequence[int]]]:
    """Split `shapes`, in order, into groups of at most 64 MiB in fp32, or one tensor, to be held one at a time."""
    group: dict[str, Sequence[int]] = {}
    num_bytes = 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        if group and num_bytes + size > _GROUP_BYTES:
            yield group
            group, num_bytes = {}, 0
        group[name] = shape
        num_bytes += size
    if group:
        yield group


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes `out` when the block ends without an error, and is removed otherwise."""
    if out.exists():
        raise InputError(f"{out}: exists already; choose another folder or delete this one")
    make_folder(out.parent)
    temporary = out.with_name(f"{out.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    make_folder(temporary)
    try:
        yield temporary
        try:
            sync_folder(temporary)
            temporary.rename(out)
            sync_folder(out.parent)
        except OSError as error:
            raise PomscaleError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
