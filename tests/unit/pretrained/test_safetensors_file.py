"""safetensors files whose bytes change while they are read, or afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from isal import isal_zlib

from pomscale.base.errors import InputError
from pomscale.pretrained import safetensors_file
from pomscale.pretrained.safetensors_file import read_safetensors, write_safetensors


def test_what_is_loaded_is_what_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors returns a mapping of the file, which a copy over it in place changes after the checksum."""
    path = tmp_path / "model.safetensors"
    ones = torch.ones(3000)
    crc32s = write_safetensors(path, {"a": (3000,)}, [ones], torch.float32)

    crc32_of = isal_zlib.crc32

    def overwritten_afterwards(content: memoryview) -> int:
        crc32: int = crc32_of(content)
        with path.open("r+b") as file:
            file.seek(-ones.nbytes, 2)
            file.write(bytes(ones.nbytes))
        return crc32

    loaded = torch.empty(3000)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file.isal_zlib, "crc32", overwritten_afterwards)
        read_safetensors(path, {"a": loaded}, crc32s)
    assert torch.equal(loaded, ones)
    with pytest.raises(InputError, match=r"model\.safetensors: a is damaged; copy the file again"):
        read_safetensors(path, {"a": loaded}, crc32s)
