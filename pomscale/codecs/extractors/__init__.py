"""Networks that turn pictures and clips into features for metrics.

Teachers of representation alignment are among them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pomscale.base.errors import InputError
from pomscale.base.imports import large_imports
from pomscale.codecs.extractors.base import Extractor, FeatureName
from pomscale.codecs.extractors.digits import Digits
from pomscale.codecs.extractors.inception import Inception
from pomscale.codecs.extractors.pixels import Pixels
from pomscale.codecs.extractors.torchscript import TorchScript

__all__ = ["Extractor", "FeatureName", "build_extractor"]

# transformers is optional and takes seconds to import: its adapters are imported where they are built.
# ruff: noqa: PLC0415

_SOURCES = {
    "inception": (
        "inception:FILE",
        "the weights of torch-fidelity and pytorch-fid: https://github.com/toshas/torch-fidelity/releases/download/"
        "v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    ),
    "torchscript": (
        "torchscript:FILE",
        "a TorchScript module that takes uint8; for FVD: https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt",
    ),
    "dinov2": (
        "dinov2:FOLDER",
        "a folder of transformers: hf download facebook/dinov2-large --local-dir FOLDER",
    ),
    "clip": (
        "clip:FOLDER",
        "a folder of transformers: hf download openai/clip-vit-large-patch14-336 --local-dir FOLDER",
    ),
}
_WITHOUT_FILES = ("digits", "pixels")


def build_extractor(spec: str, device: torch.device | str = "cpu") -> Extractor:
    """Return the extractor that a text names.

    Args:
        spec: "inception:FILE", "torchscript:FILE", "dinov2:FOLDER", "clip:FOLDER", "digits" or "pixels". Nothing is
            ever downloaded.
        device: Device of the network, where features are computed.

    Raises:
        InputError: The name is unknown, or the file or folder is missing (the message says where it is to be had), is
            incomplete, or holds another network.
    """
    name, colon, path = spec.partition(":")
    if name in _WITHOUT_FILES:
        if colon:
            raise InputError(f"extractor {spec}: {name} takes no file; write {name}")
        return Digits().to(device) if name == "digits" else Pixels().to(device)
    if name not in _SOURCES:
        forms = ", ".join([form for form, _ in _SOURCES.values()] + list(_WITHOUT_FILES))
        raise InputError(f"extractor {spec}: there is no {name!r}; choose from {forms}")
    form, source = _SOURCES[name]
    is_there = Path(path).is_dir() if form.endswith("FOLDER") else Path(path).is_file()
    if not path or not is_there:
        what = f"{path} is no {form.partition(':')[2].lower()} here" if path else f"write {form}"
        raise InputError(f"extractor {spec}: {what}. Nothing is downloaded by itself; get {source}")
    return _build(name, Path(path)).to(device)


def _build(name: str, path: Path) -> Extractor:
    if name == "inception":
        return Inception(path)
    if name == "torchscript":
        return TorchScript(path)
    if name == "dinov2":
        with large_imports():
            from pomscale.codecs.extractors.dinov2 import DinoV2

        return DinoV2(path)
    with large_imports():
        from pomscale.codecs.extractors.clip import Clip

    return Clip(path)
