"""pomscale: large-scale training of attention-free diffusion models (Polymorphers).

The public face; everything else may move:

    pomscale.PoM, pomscale.BlockCausal              the mixer as a layer
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
    from pomscale.ops.pom import BlockCausal
    from pomscale.pretrained.load import decode, load_pretrained, sample
    from pomscale.sampling.stream import ClipStream

__version__ = "0.1.0"

__all__ = ["BlockCausal", "ClipStream", "PoM", "__version__", "build_model", "decode", "load_pretrained", "sample"]

_HOMES = {
    "BlockCausal": "pomscale.ops.pom",
    "ClipStream": "pomscale.sampling.stream",
    "PoM": "pomscale.layers",
    "build_model": "pomscale.models",
    "decode": "pomscale.pretrained.load",
    "load_pretrained": "pomscale.pretrained.load",
    "sample": "pomscale.pretrained.load",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `pomscale --help` and a login node should not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pomscale' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
