"""Weights and pictures that depend on names and numbers alone, so that golden values need no file of 90 MB.

Only uniform numbers of PCG64 are drawn, whose stream numpy keeps from version to version. This module imports numpy
alone: it also runs in the environment of torch-fidelity (tests/golden/torch_fidelity_values.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

# Ranges of what is no kernel, by the end of the name. They keep activations near 1 through all layers.
_RANGES = {
    "bn.weight": (0.8, 1.2),
    "bn.bias": (-0.3, 0.3),
    "running_mean": (-0.3, 0.3),
    "running_var": (0.8, 1.2),
    "fc.weight": (-1.0, 1.0),
    "fc.bias": (-2.0, 2.0),
}


def _generator(text: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])))


def seeded_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, npt.NDArray[np.float32]]:
    """Return a weights file's tensors, each a function of its name and shape. Kernels have He's variance."""
    tensors = {}
    for name, shape in shapes.items():
        ranges = [bounds for end, bounds in _RANGES.items() if name.endswith(end)]
        bound = (6.0 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.0
        low, high = ranges[0] if ranges else (-bound, bound)
        tensors[name] = (low + (high - low) * _generator(name).random(shape)).astype(np.float32)
    return tensors


def seeded_pictures(label: str, count: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return pictures (count, height, width, 3): waves of random colours and lengths, and noise of random strength."""
    rng = _generator(f"pictures {label}")
    rows, columns = np.mgrid[0:height, 0:width]
    pictures = np.empty((count, height, width, 3), np.uint8)
    for picture in pictures:
        middle, swing = 60 + 130 * rng.random((2, 3))
        down, across, phase = rng.random(3) * (0.5, 0.5, 6.0)
        waves = np.sin(down * rows + across * columns + phase)[..., None] * swing
        noise = (rng.random((height, width, 3)) - 0.5) * 200 * rng.random()
        picture[:] = np.rint(np.clip(middle + waves + noise, 0, 255))
    return pictures
