"""What the extractors on transformers share: a local folder that is loaded, and pictures that are resized by Pillow."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.codecs.loading import brief, check_fits


def model_type(name: str, folder: Path, accepted: Sequence[str]) -> str:
    """Return "model_type" of a folder's config.json. Raises InputError if it is none of `accepted`."""
    try:
        found = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"extractor {name}: {folder} has no config.json of transformers ({error}); get it again"
        ) from error
    if found not in accepted:
        raise InputError(f"extractor {name}: {folder} holds a model of type {found!r}, and not {' or '.join(accepted)}")
    return str(found)


def load_network(name: str, folder: Path, network_class: Any) -> Any:
    """Load a network in fp32, frozen, on the CPU. Raises InputError if weights are missing or do not fit."""
    try:
        network, loading = network_class.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"extractor {name}: cannot load a {network_class.__name__} from {folder}: {brief(error)}. "
            f"Get the whole folder, with config.json and weights"
        ) from error
    check_fits(  # transformers only warns of these, and gives missing tensors random values
        f"extractor {name}",
        str(folder),
        {"missing": loading["missing_keys"], "mismatched": loading["mismatched_keys"]},
    )
    return network.eval().requires_grad_(False)


def check_normalisation(name: str, folder: Path, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise InputError if a folder's preprocessor_config.json, where it has one, names another mean or deviation."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return
    settings = json.loads(file.read_text())
    for key, expected in (("image_mean", mean), ("image_std", std)):
        found = settings.get(key, expected)
        if not np.allclose(found, expected, atol=1e-6):
            raise InputError(
                f"extractor {name}: {file} has {key} {found}, and the metric is defined with {list(expected)}; "
                f"take a network that was trained with these"
            )


def resized(
    pictures: Tensor, size: int, crop: Callable[[Image.Image], Image.Image] = lambda picture: picture
) -> Tensor:
    """Return pictures (b, 3, size, size) fp32 in [0, 1], resized by Pillow's bicubic filter, which antialiases.

    Args:
        pictures: (b, 3, h, w), uint8.
        size: Height and width of the output; another aspect is squashed.
        crop: What is done before.
    """
    arrays = pictures.cpu().permute(0, 2, 3, 1).numpy()
    out = [np.asarray(crop(Image.fromarray(array)).resize((size, size), Image.Resampling.BICUBIC)) for array in arrays]
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 255.0


def normalised(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (x - mean) / std of pictures (b, 3, h, w) in [0, 1], channel by channel."""
    return (pictures - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
