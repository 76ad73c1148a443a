"""torch-fidelity as a rival: a program of the standard library and torch-fidelity, run by an interpreter that has it.

    PYTHON torch_fidelity_rival.py WEIGHTS FOLDER NUM_THREADS

For each line on standard input, it computes pooled features and logits of the PNGs in FOLDER by torch-fidelity's own
reader and extractor, and writes a line of JSON: seconds, and the mean of all features, by which results are compared.
Imports, weights and the start of the process are not in the seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

_BATCH = 64  # torch-fidelity's default


def main() -> int:
    # None of these is installed beside pomscale: torch-fidelity needs torchvision, which must fit its torch.
    import torch  # noqa: PLC0415
    from torch_fidelity.datasets import ImagesPathDataset  # noqa: PLC0415
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: PLC0415
    from torch_fidelity.utils import get_featuresdict_from_dataset  # noqa: PLC0415

    weights, folder, num_threads = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    names = ["2048", "logits_unbiased"]
    extractor: Any = FeatureExtractorInceptionV3("rival", names, weights)
    pictures = ImagesPathDataset(sorted(map(str, Path(folder).glob("*.png"))))
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        features = get_featuresdict_from_dataset(pictures, extractor, _BATCH, False, True, False)
        seconds = time.perf_counter() - start
        means = {name: float(features[name].double().mean()) for name in names}
        print(json.dumps({"seconds": seconds, "means": means}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
