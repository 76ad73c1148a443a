"""Networks that turn pictures and clips into features for metrics.

Teachers of representation alignment are among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pomscale.base.errors import InputError
from pomscale.base.imports import large_imports
from pomscale.codecs.extractors.base import Extractor, FeatureName, Teacher
from pomscale.codecs.extractors.digits import Digits
from pomscale.codecs.extractors.inception import Inception
from pomscale.codecs.extractors.pixels import Pixels
from pomscale.codecs.extractors.teachers import FeatureEncoder
from pomscale.codecs.extractors.torchscript import TorchScript, TorchScriptTeacher
from pomscale.config.codecs import FeaturesConfig

__all__ = ["Extractor", "FeatureEncoder", "FeatureName", "build_extractor", "build_feature_encoder"]

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
_TEACHERS = ("dinov2", "torchscript", "digits")


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
    name, path = _found("extractor", spec, (*_SOURCES, *_WITHOUT_FILES))
    return _build(name, path).to(device)


def build_feature_encoder(
    config: FeaturesConfig, size: tuple[int, int], device: torch.device | str = "cpu"
) -> FeatureEncoder:
    """Return the encoder of the features that a recipe asks for.

    Args:
        config: Section `features` of the recipe.
        size: Height and width in pixels of pictures or frames.
        device: Device of the teacher.

    Raises:
        InputError: As of `build_extractor`, or the teacher does not take such pictures.
    """
    name, path = _found("features.teacher", config.teacher, _TEACHERS)
    if config.input_size is not None and name != "dinov2":
        raise InputError(f"features.input_size: is for dinov2; {name} takes pictures as they are")
    teacher: Teacher
    if name == "digits":
        teacher = Digits()
    elif name == "torchscript":
        teacher = TorchScriptTeacher(path, size)
    else:
        with large_imports():
            from pomscale.codecs.extractors.dinov2 import DEFAULT_SIZE, DinoV2

        teacher = DinoV2(path, config.input_size or DEFAULT_SIZE)
    return FeatureEncoder(teacher.to(device), config.grid)


def _found(key: str, spec: str, names: Sequence[str]) -> tuple[str, Path]:
    """Return name and path that a text names. Raises InputError if the name is unknown, or nothing is there.

    Args:
        key: Beginning of messages.
        spec: NAME or NAME:PATH.
        names: The names that may be.
    """
    name, colon, text = spec.partition(":")
    if name not in names:
        forms = ", ".join(_SOURCES[one][0] if one in _SOURCES else one for one in names)
        raise InputError(f"{key} {spec}: there is no {name!r}; choose from {forms}")
    path = Path(text)
    if name in _WITHOUT_FILES:
        if colon:
            raise InputError(f"{key} {spec}: {name} takes no file; write {name}")
        return name, path
    form, source = _SOURCES[name]
    is_there = path.is_dir() if form.endswith("FOLDER") else path.is_file()
    if not text or not is_there:
        what = f"{path} is no {form.partition(':')[2].lower()} here" if text else f"write {form}"
        raise InputError(f"{key} {spec}: {what}. Nothing is downloaded by itself; get {source}")
    return name, path


def _build(name: str, path: Path) -> Extractor:
    if name in _WITHOUT_FILES:
        return Digits() if name == "digits" else Pixels()
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
