"""The extractor `inception` against torch-fidelity 0.4.0, whose values were kept by torch_fidelity_values.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pomscale.codecs.extractors import build_extractor
from pomscale.codecs.extractors.inception_network import InceptionNetwork
from support.seeded_inception import seeded_pictures, seeded_weights

GOLDEN = json.loads(Path(__file__).with_name("torch_fidelity.json").read_text())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.device("meta"):
        shapes = InceptionNetwork().file_shapes()
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({name: torch.from_numpy(array) for name, array in seeded_weights(shapes).items()}, file)
    return file


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The trace of the root of the product of two covariances is the sum of the singular values of this product."""
    a_centred, b_centred = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    root = np.linalg.svd(a_centred @ b_centred.T, compute_uv=False).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + (a_centred**2).sum() + (b_centred**2).sum() - 2 * root)


def check(values: np.ndarray, expected: dict[str, list[float]], what: str) -> None:
    """Compare features (n, d) with what is kept of them."""
    stride = GOLDEN["stride"]
    found = {
        "first": values[0, ::stride],
        "mean": values.mean(0)[::stride],
        "variance": values.var(0, ddof=1)[::stride],
        "norms": np.linalg.norm(values, axis=1),
    }
    for key, value in found.items():
        scale = np.abs(expected[key]).max()
        np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=1e-5 * scale, err_msg=f"{what} {key}")


@pytest.mark.parametrize("name", ["few", pytest.param("many", marks=pytest.mark.exhaustive)])
def test_features_and_distance_are_those_of_torch_fidelity(name: str, weights: Path) -> None:
    golden = GOLDEN[name]
    extractor = build_extractor(f"inception:{weights}")
    pooled = {}
    for label in "AB":
        pictures = torch.from_numpy(seeded_pictures(f"{name} {label}", *golden["shape"])).permute(0, 3, 1, 2)
        features = extractor.extract(pictures, ("pooled", "logits"))
        for feature, values in features.items():
            if (key := f"{feature} {label}") in golden["features"]:
                check(values.double().numpy(), golden["features"][key], key)
        pooled[label] = features["pooled"].double().numpy()
    expected = golden["metrics"]["frechet_inception_distance"]
    assert frechet(pooled["A"], pooled["B"]) == pytest.approx(expected, rel=1e-3)
