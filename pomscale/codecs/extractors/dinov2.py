"""DINOv2 as dgm-eval (Stein et al., arXiv 2306.04675), which defined FD-DINOv2, uses it, and as a teacher.

Pictures are resized to 224x224 by Pillow's bicubic filter, whatever their aspect, and normalised by ImageNet's mean and
deviation; the feature is the class token after the last normalisation. dgm-eval takes the network from
torch.hub (facebookresearch/dinov2), and this the same weights in the format of transformers. A teacher's map is made of
the patch tokens after the last normalisation, without class and register tokens, as in REPA (arXiv 2410.06940), which
resizes pictures of 256x256 to 224x224, too, and those of 512x512 to 448x448.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pomscale.base.errors import InputError
from pomscale.codecs.extractors.base import FeatureName, check_media, inference, weights_identity
from pomscale.codecs.extractors.vision_transformers import (
    check_normalisation,
    load_network,
    model_type,
    normalised,
    resized,
)

try:
    from transformers import Dinov2Model, Dinov2WithRegistersModel
except ImportError as error:
    raise InputError("extractor dinov2: the package transformers is missing: pip install -e '.[text]'") from error

DEFAULT_SIZE = 224
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_OFFSET = 0.1  # of Meta's code, where position embeddings are interpolated
_CLASSES = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
_ARITHMETIC_KEYS = ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "use_swiglu_ffn")


class DinoV2:
    """Extractor and teacher of colour pictures of any size."""

    name = "dinov2"
    num_channels: Literal[3] = 3
    takes_clips = False

    def __init__(self, folder: Path, size: int = DEFAULT_SIZE) -> None:
        """Load a folder of transformers, for pictures that are resized to `size` x `size` pixels.

        Raises InputError if the folder is incomplete or holds another model, or if no patches fill the size.
        """
        kind = model_type(self.name, folder, tuple(_CLASSES))
        check_normalisation(self.name, folder, _MEAN, _STD)
        self._network: Any = load_network(self.name, folder, _CLASSES[kind])
        config = self._network.config
        architecture = {key: getattr(config, key) for key in _ARITHMETIC_KEYS}
        self._size, self._patches = size, size // int(config.patch_size)
        if size % int(config.patch_size):
            raise InputError(
                f"extractor dinov2: {size} pixels are no multiple of the patches of {config.patch_size} of the network "
                f"in {folder}; choose another input_size"
            )
        self.identity = weights_identity(f"{architecture} pillow-bicubic-{size} 1", self._network.state_dict())
        self.dim = int(config.hidden_size)
        self.dims: dict[FeatureName, int | None] = {"pooled": self.dim}
        self.device = torch.device("cpu")
        if kind == "dinov2":  # the network with registers is interpolated alike in both
            embeddings = self._network.embeddings
            positions = _interpolate_as_meta(embeddings.position_embeddings.data, self._patches)
            embeddings.position_embeddings.data = positions

    def check_size(self, *size: int) -> None:
        """Accept any size."""

    def extract(self, media: Tensor, names: tuple[FeatureName, ...] = ("pooled",)) -> dict[FeatureName, Tensor]:
        check_media(self, media, names)
        return {"pooled": self._tokens(media)[:, 0]}

    def map_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.dim, self._patches, self._patches

    def feature_map(self, pictures: Tensor) -> Tensor:
        check_media(self, pictures, ())
        patches = self._tokens(pictures)[:, -(self._patches**2) :]  # behind class and register tokens
        return patches.transpose(1, 2).unflatten(2, (self._patches, self._patches))

    def _tokens(self, media: Tensor) -> Tensor:
        """Return all tokens (b, n, d) after the last normalisation."""
        with inference(self.device):
            pictures = normalised(resized(media, self._size), _MEAN, _STD).to(self.device)
            return self._network(pixel_values=pictures).last_hidden_state

    def to(self, device: torch.device | str) -> DinoV2:
        self.device = torch.device(device)
        self._network.to(self.device)
        return self


def _interpolate_as_meta(embeddings: Tensor, grid: int) -> Tensor:
    """Return position embeddings (1, 1 + grid * grid, d) as Meta's code interpolates them.

    It gives `interpolate` the factor (grid + 0.1) / m, and transformers the size; positions between differ by 0.6 %.

    Args:
        embeddings: (1, 1 + m * m, d), that of the class token first.
        grid: Patches in each direction.
    """
    before = math.isqrt(embeddings.shape[1] - 1)
    if before == grid:
        return embeddings
    patches = embeddings[:, 1:].reshape(1, before, before, -1).permute(0, 3, 1, 2)
    factor = (grid + _OFFSET) / before
    patches = interpolate(patches, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    return torch.cat([embeddings[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)
