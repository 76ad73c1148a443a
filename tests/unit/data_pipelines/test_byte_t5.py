"""The text encoder of seeded weights that the video quickstart makes for itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from data_pipelines.demos.byte_t5 import write_byte_t5
from pomscale.codecs import build_text_encoder
from pomscale.config.text import TextEncoderConfig


def test_it_is_the_same_on_every_call_and_tells_captions_apart(tmp_path: Path) -> None:
    encoders = []
    for name in ("one", "two"):
        write_byte_t5(tmp_path / name)
        config = TextEncoderConfig(path=str(tmp_path / name), tokenizer="bytes", max_length=32, precision="fp32")
        encoders.append(build_text_encoder(config))
    first, second = encoders
    assert first.identity() == second.identity()
    assert first.dim == 64
    left, right, empty = first.encode(["one moving left", "one moving right", ""])
    np.testing.assert_array_equal(left, second.encode(["one moving left"])[0])
    assert left.shape == (16, 64)  # a token per byte, and the end
    assert empty.shape == (1, 64)
    assert np.abs(left[:10] - right[:10]).max() > 0.01  # a token knows of the words after it
