"""The digits as PNGs and as shards."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.demos.digits import write_digits
from data_pipelines.encode.encode import encode
from pomscale.config.load import load_encode_recipe
from support.paths import RECIPES


def make_digits(root: Path) -> None:
    """Write root/digits/{train,heldout} (PNGs) and root/latents/{train,heldout} (shards)."""
    write_digits(root / "digits")
    for half in ("train", "heldout"):
        overrides = [f"source.path={root}/digits/{half}", f"output={root}/latents/{half}"]
        encode(load_encode_recipe(RECIPES / "data" / "digits.yaml", overrides), progress=False)
