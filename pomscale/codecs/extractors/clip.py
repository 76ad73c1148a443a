"""CLIP as CMMD's reference (Jayasumana et al., arXiv 2401.09603; google-research/cmmd) uses it, and its texts.

Pictures are cropped to the central square, resized by Pillow's bicubic filter to the network's size, and normalised by
CLIP's own mean and deviation; the feature is the projected embedding, divided by its norm. The CLIP score
(Hessel et al., arXiv 2104.08718) compares it with `embed_texts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from pomscale.base.errors import InputError
from pomscale.codecs.extractors.base import FeatureName, check_media, inference, weights_identity
from pomscale.codecs.extractors.vision_transformers import (
    check_normalisation,
    load_network,
    model_type,
    normalised,
    resized,
)
from pomscale.codecs.loading import brief

try:
    from transformers import AutoTokenizer, CLIPModel
except ImportError as error:
    raise InputError("extractor clip: the package transformers is missing: pip install -e '.[text]'") from error

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_ARITHMETIC_KEYS = ("hidden_act", "layer_norm_eps", "num_attention_heads")


class Clip:
    """Extractor of colour pictures of any size, and embedder of texts."""

    name = "clip"
    num_channels: Literal[3] = 3
    takes_clips = False

    def __init__(self, folder: Path) -> None:
        """Load a folder of transformers. Raises InputError if it is incomplete or holds another model."""
        model_type(self.name, folder, ("clip",))
        check_normalisation(self.name, folder, _MEAN, _STD)
        self.folder = folder
        self._network: Any = load_network(self.name, folder, CLIPModel)
        self._tokenizer: Any = None  # pictures need none
        config = self._network.config
        self._size = int(config.vision_config.image_size)
        towers = {"text": config.text_config, "vision": config.vision_config}
        architecture = {name: [getattr(tower, key) for key in _ARITHMETIC_KEYS] for name, tower in towers.items()}
        tag = f"clip {architecture} centre-pillow-bicubic-{self._size} 1"
        self.identity = weights_identity(tag, self._network.state_dict())
        self.dims: dict[FeatureName, int | None] = {"pooled": int(config.projection_dim)}
        self.device = torch.device("cpu")

    def check_size(self, *size: int) -> None:
        """Accept any size."""

    def extract(self, media: Tensor, names: tuple[FeatureName, ...] = ("pooled",)) -> dict[FeatureName, Tensor]:
        check_media(self, media, names)
        with inference(self.device):
            pictures = normalised(resized(media, self._size, _central_square), _MEAN, _STD).to(self.device)
            projected = self._network.get_image_features(pixel_values=pictures).pooler_output
            return {"pooled": normalize(projected, dim=-1)}

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings (n, d) fp32 of norm 1, which are compared with those of pictures.

        Texts longer than the network's context (77 tokens) are cut, as CLIP's own code does.

        Raises:
            InputError: The folder has no tokenizer, or that of another network.
        """
        config = self._network.config.text_config
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self.folder, int(config.vocab_size))
        length = int(config.max_position_embeddings)
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        with inference(self.device):
            features = self._network.get_text_features(
                input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device)
            )
            return normalize(features.pooler_output, dim=-1)

    def to(self, device: torch.device | str) -> Clip:
        self.device = torch.device(device)
        self._network.to(self.device)
        return self


def _central_square(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _load_tokenizer(folder: Path, num_embeddings: int) -> Any:
    """Load the tokenizer of a network of so many tokens.

    transformers makes one of its special tokens alone, without a word, of a folder that has none: so they are counted.
    """
    remedy = "Get the whole folder, with tokenizer.json or vocab.json and merges.txt"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"extractor clip: cannot load the tokenizer in {folder}: {brief(error)}. {remedy}") from error
    if len(tokenizer) != num_embeddings:
        raise InputError(
            f"extractor clip: the tokenizer in {folder} has {len(tokenizer)} tokens, and the network {num_embeddings}. "
            f"{remedy}"
        )
    return tokenizer
