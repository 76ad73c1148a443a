"""Write torch_fidelity.json: what torch-fidelity 0.4.0 finds for pictures and weights that depend on seeds alone.

It runs in an environment of its own, since torchvision must fit its torch (on a CPU, both from one index):

    python -m venv /tmp/torch-fidelity
    /tmp/torch-fidelity/bin/pip install torch-fidelity==0.4.0 torch torchvision scipy
    PYTHONPATH=tests /tmp/torch-fidelity/bin/python tests/golden/torch_fidelity_values.py

Metrics are those of two sets of PNGs, A and B, that are given as input1 and input2. KID is that of one subset of all
pictures, so it is the unbiased estimate over all. The inception score is that of A, in two splits: of files in order,
and ("shuffled") in torch-fidelity's default order.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric

from support.seeded_inception import seeded_pictures, seeded_weights

GOLDEN = Path(__file__).with_name("torch_fidelity.json")
# Pictures per set, height and width; "few" is what every run of the tests takes.
SETS = {"few": (12, 72, 88), "many": (32, 320, 300)}
SPLITS = 2
FEATURES = {"pooled": "2048", "logits": "logits_unbiased"}
STRIDE = 61  # of the values that are kept of each feature


def write_weights(folder: Path) -> Path:
    """Write a weights file with the names and shapes of the real one."""
    load, FeatureExtractorInceptionV3.load_state_dict = FeatureExtractorInceptionV3.load_state_dict, lambda *_: None
    torch.save({}, folder / "empty.pth")
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in FeatureExtractorInceptionV3("shapes", ["2048"], str(folder / "empty.pth"))
        .state_dict()
        .items()
        if not name.endswith("num_batches_tracked")
    }
    FeatureExtractorInceptionV3.load_state_dict = load
    file = folder / "weights.pth"
    torch.save({name: torch.from_numpy(array) for name, array in seeded_weights(shapes).items()}, file)
    return file


def measure(folder: Path, weights: Path, name: str) -> dict[str, Any]:
    """Return metrics of two sets, and a part of their features."""
    count, height, width = SETS[name]
    for label in "AB":
        (folder / name / label).mkdir(parents=True)
        for number, array in enumerate(seeded_pictures(f"{name} {label}", count, height, width)):
            Image.fromarray(array).save(folder / name / label / f"{number:04d}.png")
    metrics = torch_fidelity.calculate_metrics(
        input1=str(folder / name / "A"),
        input2=str(folder / name / "B"),
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",  # its precision and recall would take VGG-16
        isc_splits=SPLITS,
        kid_subsets=1,
        kid_subset_size=count,
        samples_shuffle=False,
        feature_extractor_weights_path=str(weights),
        cuda=False,
        save_cpu_ram=True,
        cache_root=str(folder / "cache"),
        input1_cache_name=f"{name}-A",
        input2_cache_name=f"{name}-B",
        batch_size=8,
        verbose=False,
    )
    found: dict[str, Any] = {"shape": [count, height, width], "metrics": metrics, "features": {}}
    for feature, their_name in FEATURES.items():
        for label in "AB":
            files = list((folder / "cache").glob(f"{name}-{label}-*-features-{their_name}.pt"))
            if not files:
                continue  # logits of B are not needed for any metric
            values = torch.load(files[0]).double()
            found["features"][f"{feature} {label}"] = {
                "mean": values.mean(0)[::STRIDE].tolist(),
                "variance": values.var(0)[::STRIDE].tolist(),
                "first": values[0, ::STRIDE].tolist(),
                "norms": values.norm(dim=1).tolist(),
            }
            if feature == "logits":
                shuffled = isc_features_to_metric(values.float(), splits=SPLITS, shuffle=True, rng_seed=2020)
                metrics |= {f"{key}_shuffled": value for key, value in shuffled.items()}
    return found


def main() -> int:
    packages = ("torch-fidelity", "torch", "torchvision", "numpy", "pillow")
    content: dict[str, Any] = {"versions": {package: version(package) for package in packages}, "stride": STRIDE}
    with tempfile.TemporaryDirectory() as scratch:
        weights = write_weights(Path(scratch))
        for name in SETS:
            content[name] = measure(Path(scratch), weights, name)
            print(name, json.dumps(content[name]["metrics"], indent=1), flush=True)
            GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
