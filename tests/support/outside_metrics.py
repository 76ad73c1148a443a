"""Random features, and what other packages make of them: tests/golden/metrics.json.

The script runs in an environment of its own, since torch-fidelity needs torchvision, which must fit its torch, and
without pomscale:

    python -m venv ENV && ENV/bin/pip install torch-fidelity==0.4.0 prdc==0.2 pytorch-fid==0.3.0 scipy==1.17.1
    ENV/bin/python tests/support/outside_metrics.py [DISTANCE.PY]

DISTANCE.PY is `distance.py` of github.com/sayakpaul/cmmd-pytorch (f7673a9), the port of CMMD's reference code.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

GOLDEN = Path(__file__).parent.parent / "golden" / "metrics.json"
Float32 = npt.NDArray[np.float32]


def pooled_features(num_samples: int, width: int, seed: int, shift: float = 0.0) -> Float32:
    """Return features (n, width), positive and correlated, as those of a pooled layer are.

    RandomState is used for its stream, which numpy keeps.
    """
    random = np.random.RandomState(seed)
    mixing = np.random.RandomState(17).standard_normal((width // 4, width)) / np.sqrt(width / 4)
    latent = random.standard_normal((num_samples, width // 4)) * (1 + shift) + shift
    return np.maximum(latent @ mixing + 0.1 * random.standard_normal((num_samples, width)), 0).astype(np.float32)


def class_logits(num_samples: int, num_classes: int, seed: int) -> Float32:
    """Return logits (n, num_classes) of samples that come class by class."""
    random = np.random.RandomState(seed)
    logits = 2 * random.standard_normal((num_samples, num_classes))
    logits[np.arange(num_samples), np.arange(num_samples) * num_classes // num_samples] += 4
    return logits.astype(np.float32)


def small_sets() -> tuple[Float32, Float32]:
    """Return generated (1203, 64) and real (1101, 64) features."""
    return pooled_features(1203, 64, seed=1, shift=0.2), pooled_features(1101, 64, seed=2)


def wide_sets() -> tuple[Float32, Float32]:
    """Return generated (5000, 2048) and real (4500, 2048) features."""
    return pooled_features(5000, 2048, seed=3, shift=0.1), pooled_features(4500, 2048, seed=4)


def few_sets() -> tuple[Float32, Float32]:
    """Return fewer samples than features: generated (50, 256), real (300, 256)."""
    return pooled_features(50, 256, seed=5, shift=0.1), pooled_features(300, 256, seed=6)


def _moments(features: Float32) -> tuple[Any, Any]:
    wide = features.astype(np.float64)
    return wide.mean(0), np.cov(wide, rowvar=False)


def _measure_torch_fidelity() -> dict[str, Any]:
    import torch  # noqa: PLC0415
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # noqa: PLC0415
    from torch_fidelity.metric_isc import isc_features_to_metric  # noqa: PLC0415
    from torch_fidelity.metric_kid import kid_features_to_metric  # noqa: PLC0415
    from torch_fidelity.metric_prc import prc_features_to_metric  # noqa: PLC0415

    sets = {"small": small_sets(), "few": few_sets(), "wide": wide_sets()}
    fid = {}
    for name, pair in sets.items():
        statistics = [fid_features_to_statistics(torch.from_numpy(features)) for features in pair]
        fid[name] = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    generated, real = (torch.from_numpy(features) for features in small_sets())
    return {
        "fid": fid,
        "inception_score": isc_features_to_metric(torch.from_numpy(class_logits(1003, 10, seed=7))),
        "inception_score in order": isc_features_to_metric(
            torch.from_numpy(class_logits(1003, 10, seed=7)), shuffle=False
        ),
        "kid": kid_features_to_metric(generated, real, verbose=False),
        "precision_recall": prc_features_to_metric(generated, real, verbose=False),
    }


def _measure_pytorch_fid() -> dict[str, Any]:
    from pytorch_fid.fid_score import calculate_frechet_distance  # noqa: PLC0415

    fid = {}
    for name, (generated, real) in {"small": small_sets(), "few": few_sets(), "wide": wide_sets()}.items():
        try:
            fid[name] = float(calculate_frechet_distance(*_moments(generated), *_moments(real)))
        except Exception as error:  # noqa: BLE001 - whatever it raises is the result
            fid[name] = f"{type(error).__name__}: {error}"
    return {"fid": fid}


def _measure_prdc() -> dict[str, Any]:
    from prdc import compute_prdc  # noqa: PLC0415

    generated, real = small_sets()
    values = compute_prdc(real, generated, nearest_k=5)
    return {name: float(value) for name, value in values.items()}


def _measure_cmmd(file: Path) -> float:
    sys.path.insert(0, str(file.parent))
    module = importlib.import_module(file.stem)
    embeddings = [features / np.linalg.norm(features, axis=1, keepdims=True) for features in small_sets()]
    return float(module.mmd(*embeddings))


def main() -> None:
    """Write the golden file."""
    packages = ("torch", "torch-fidelity", "prdc", "pytorch-fid", "numpy", "scipy", "scikit-learn")
    golden = {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "torch-fidelity": _measure_torch_fidelity(),
        "pytorch-fid": _measure_pytorch_fid(),
        "prdc": _measure_prdc(),
    }
    if len(sys.argv) > 1:
        golden["cmmd"] = _measure_cmmd(Path(sys.argv[1]))
    GOLDEN.write_text(json.dumps(golden, indent=2) + "\n")


if __name__ == "__main__":
    main()
