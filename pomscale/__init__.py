"""pomscale: large-scale training of attention-free diffusion models (Polymorphers).

This is the public interface; everything else may move:

    pomscale.PoM, pomscale.BlockCausal, pomscale.Segments    the mixer as a layer, its masks
    pomscale.build_model                            a named network with initial weights
    pomscale.load_pretrained, sample, decode        trained models
    pomscale.ClipStream                             clips of any length, frame group by frame group
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pomscale.layers import PoM
    from pomscale.models import build_model
    from pomscale.ops.pom import BlockCausal, Segments
    from pomscale.pretrained.load import load_pretrained
    from pomscale.sampling.api import decode, sample
    from pomscale.sampling.stream import ClipStream

__version__ = "0.1.0"

__all__ = [
    "BlockCausal",
    "ClipStream",
    "PoM",
    "Segments",
    "__version__",
    "build_model",
    "decode",
    "load_pretrained",
    "sample",
]

_MODULES = {
    "BlockCausal": "pomscale.ops.pom",
    "ClipStream": "pomscale.sampling.stream",
    "PoM": "pomscale.layers",
    "Segments": "pomscale.ops.pom",
    "build_model": "pomscale.models",
    "decode": "pomscale.sampling.api",
    "load_pretrained": "pomscale.pretrained.load",
    "sample": "pomscale.sampling.api",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `pomscale --help` and a login node do not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'pomscale' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
