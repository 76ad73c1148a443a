"""Several text encoders side by side, in the place of one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pomscale.codecs.base import SingleTextEncoder
from pomscale.shards.schema import joint_identity
from pomscale.shards.texts import joined


class JointTextEncoder:
    """Embeds each caption by every encoder; the sequences follow each other, as a network is trained on them."""

    def __init__(self, parts: Sequence[SingleTextEncoder]) -> None:
        self.parts = tuple(parts)

    @property
    def dim(self) -> int:
        return max(part.dim for part in self.parts)

    @property
    def max_length(self) -> int:
        return sum(part.max_length for part in self.parts)

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """Return (n, dim) float32 per caption, the narrower embeddings padded with zeros on channels."""
        return [joined(of_caption) for of_caption in zip(*(part.encode(captions) for part in self.parts), strict=True)]

    def identity(self) -> str:
        return joint_identity([part.identity() for part in self.parts])

    def to(self, device: torch.device | str) -> JointTextEncoder:
        for part in self.parts:
            part.to(device)
        return self
