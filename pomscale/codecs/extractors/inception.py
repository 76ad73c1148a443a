"""The FID's Inception-v3, as torch-fidelity's extractor "inception-v3-compat" has it.

Nodes of TensorFlow's graph inception-2015-12-05, on which the metrics are defined:

- pooled: pool_3, 2,048 values. FID, KID, precision and recall of torch-fidelity, pytorch-fid and ADM take it.
- logits: softmax/logits/MatMul, 1,008 values before the bias is added. The inception scores of torch-fidelity
  ("logits_unbiased") and of ADM take them.
- spatial: mixed_6/conv after its ReLU, which is the branch of 1x1 of Mixed_6d and so begins the output of that block;
  the first 7 channels of 17x17, 2,023 values in the order row, column, channel. ADM's sFID takes them
  (guided-diffusion, evaluations/evaluator.py); torch-fidelity has no sFID.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.codecs.extractors.base import FeatureName, check_media, inference, weights_identity
from pomscale.codecs.extractors.inception_network import NUM_CLASSES, NUM_FEATURES, InceptionNetwork

_SIZE = 299
_SPATIAL_CHANNELS = 7
_MOST_AT_ONCE = 16  # pictures; larger batches leave the caches of a CPU and are slower
_MOST_NAMES = 3
_FILE = "weights-inception-2015-12-05-6726825d.pth of torch-fidelity"


class Inception:
    """Extractor of colour pictures of any size, from uint8 as TensorFlow 1 resized it."""

    name = "inception"
    num_channels: Literal[3] = 3
    takes_clips = False

    def __init__(self, file: Path) -> None:
        """Read a weights file of torch-fidelity or pytorch-fid. Raises InputError if it holds another network."""
        with torch.device("meta"):
            network = InceptionNetwork()
        tensors = _read_weights(file, network.file_shapes())
        self.identity = weights_identity("inception-2015-12-05 uint8 resize-tf1-299 1", tensors)
        self.dims: dict[FeatureName, int | None] = {
            "pooled": NUM_FEATURES,
            "spatial": 17 * 17 * _SPATIAL_CHANNELS,
            "logits": NUM_CLASSES,
        }
        self.device = torch.device("cpu")
        self._network = network.to_empty(device="cpu").requires_grad_(False).eval()
        self._network.read(tensors)
        self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def check_size(self, *size: int) -> None:
        """Accept any size."""

    def extract(self, media: Tensor, names: tuple[FeatureName, ...] = ("pooled",)) -> dict[FeatureName, Tensor]:
        check_media(self, media, names)
        with inference(self.device):
            parts = [self._features(part, names) for part in media.split(_MOST_AT_ONCE)]
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def _features(self, pictures: Tensor, names: tuple[FeatureName, ...]) -> dict[FeatureName, Tensor]:
        x = (resize_like_tensorflow1(pictures.to(self.device), _SIZE) - 128.0) / 128.0
        pooled, spatial = self._network(x.contiguous(memory_format=torch.channels_last))
        features: dict[FeatureName, Tensor] = {"pooled": pooled}
        if "spatial" in names:
            features["spatial"] = spatial[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        if "logits" in names:
            features["logits"] = self._network.fc(pooled)
        return features

    def to(self, device: torch.device | str) -> Inception:
        """Move the network and return the extractor. On a GPU, convolutions of the process lose TF32 from here on.

        TF32 changes features by 1e-3. It is switched off once and for all, since a switch around each call would reach
        the convolutions of other threads now and then.
        """
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False
        self._network.to(self.device)
        return self


def resize_like_tensorflow1(pictures: Tensor, size: int) -> Tensor:
    """Resize as TensorFlow 1's resize_bilinear does: no half-pixel centres, no antialiasing.

    Output row i lies at input row i * height / size. The order of operations is torch-fidelity's, and so are the bits.

    Args:
        pictures: (b, c, h, w), uint8.
        size: Height and width of the output.

    Returns:
        (b, c, size, size), fp32, with values in 0..255.
    """
    top, bottom, down = _taps(pictures.shape[2], size, pictures.device)
    left, right, across = _taps(pictures.shape[3], size, pictures.device)
    rows, which = torch.unique(torch.cat([top, bottom]), return_inverse=True)
    x = pictures[:, :, rows].float()
    x_left = x[..., left]
    lines = x_left + (x[..., right] - x_left) * across  # each row that is needed once, though two rows are taken of it
    upper, lower = lines[:, :, which[:size]], lines[:, :, which[size:]]
    return upper + (lower - upper) * down[:, None]


def _taps(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return (size,) each: the two input positions of every output position, and the weight of the second."""
    position = torch.arange(size, dtype=torch.float32) * torch.tensor(length / size, dtype=torch.float32)
    first = position.long()
    second = (first + 1).clamp_max(length - 1)
    return first.to(device), second.to(device), (position - first.float()).to(device)


def _read_weights(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"extractor inception: {file} is no weights file of PyTorch ({error}). Get it again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"extractor inception: {file} holds no state_dict of tensors. Get {_FILE}")
    # Counters of batch normalisation's training are in some copies and do nothing here.
    found = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    wrong = [f"{name} is missing" for name in sorted(shapes.keys() - found.keys())]
    wrong += [f"{name} is unexpected" for name in sorted(found.keys() - shapes.keys())]
    wrong += [
        f"{name} is {tuple(found[name].shape)} and not {shape}"
        for name, shape in sorted(shapes.items())
        if name in found and tuple(found[name].shape) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - _MOST_NAMES} more" if len(wrong) > _MOST_NAMES else ""
        raise InputError(
            f"extractor inception: {file} holds another network: {', '.join(wrong[:_MOST_NAMES])}{more}. The FID is "
            f"defined with {_FILE}, and not with torchvision's weights"
        )
    return {name: found[name].float() for name in shapes}
