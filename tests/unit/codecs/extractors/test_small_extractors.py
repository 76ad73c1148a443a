"""The extractors that need no file: `pixels` and `digits`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipelines.demos.digits import read_digits
from pomscale.base.errors import InputError
from pomscale.codecs.extractors import build_extractor


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_flattened_values(channels: int) -> None:
    extractor = build_extractor("pixels")
    media = torch.randint(256, (4, channels, 5, 7), dtype=torch.uint8)
    found = extractor.extract(media)["pooled"]
    np.testing.assert_array_equal(found.numpy(), media.numpy().reshape(4, -1).astype(np.float32) / np.float32(255))
    assert extractor.num_channels is None
    assert extractor.dims == {"pooled": None}


def test_pixels_of_large_pictures_are_refused() -> None:
    extractor = build_extractor("pixels")
    extractor.check_size(32, 32)
    with pytest.raises(InputError, match="up to 32x32, and these are 33x16"):
        extractor.extract(torch.zeros(1, 3, 33, 16, dtype=torch.uint8))
    with pytest.raises(InputError, match="it has no logits features, only pooled"):
        extractor.extract(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ("pooled", "logits"))


def test_digits_recognises_what_it_was_not_fitted_on() -> None:
    digits = [digit for digit in read_digits() if digit.half == "train"]  # the network was fitted on the other half
    media = torch.from_numpy(np.stack([digit.pixels for digit in digits]))[:, None]
    extractor = build_extractor("digits")
    found = extractor.extract(media, ("logits", "pooled"))
    right = found["logits"].argmax(1) == torch.tensor([digit.label for digit in digits])
    assert right.float().mean() > 0.98
    assert {name: values.shape[1] for name, values in found.items()} == extractor.dims
    # The features tell samples apart in all directions, so their covariance can be inverted.
    covariance = np.cov(found["pooled"].double().numpy(), rowvar=False)
    assert np.linalg.matrix_rank(covariance) == 64
    torch.testing.assert_close(extractor.extract(media[5:6])["pooled"], found["pooled"][5:6], rtol=1e-5, atol=1e-6)


def test_digits_are_those_of_the_package() -> None:
    """Results name the identity: a change of the weights must be meant, and be told."""
    assert build_extractor("digits").identity.startswith("adcbb6fbe9fd9c71")


def test_digits_of_other_sizes_are_refused() -> None:
    extractor = build_extractor("digits")
    with pytest.raises(InputError, match="it takes pictures of 8x8"):
        extractor.check_size(16, 16)
    with pytest.raises(InputError, match=r"it takes grey pictures \(1 channels\), and these have 3"):
        extractor.extract(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
