"""torch-fidelity as a rival: a program of the standard library and torch-fidelity, run by an interpreter that has it.

    PYTHON torch_fidelity_rival.py WEIGHTS NUM_THREADS

Each line on standard input is a JSON object: "pictures", a folder of PNGs, for pooled features and logits by
torch-fidelity's own reader and extractor; with "reference", another folder, and "options" for its metrics. Each
answer is a line of JSON: seconds, and the mean of all features, or the metrics. Imports and the start of the process
are not in the seconds; the metrics' are those of its `calculate_metrics`, which also reads the weights.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

_BATCH = 64  # torch-fidelity's default
_FEATURES = ["2048", "logits_unbiased"]


def main() -> int:
    # None of these is installed beside pomscale: torch-fidelity needs torchvision, which must fit its torch.
    import torch  # noqa: PLC0415
    import torch_fidelity  # noqa: PLC0415
    from torch_fidelity.datasets import ImagesPathDataset  # noqa: PLC0415
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: PLC0415
    from torch_fidelity.utils import get_featuresdict_from_dataset  # noqa: PLC0415

    weights, num_threads = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    extractor: Any = FeatureExtractorInceptionV3("rival", _FEATURES, weights)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        answer: dict[str, Any]
        if "reference" in asked:
            metrics = torch_fidelity.calculate_metrics(
                input1=asked["pictures"],
                input2=asked["reference"],
                isc=True,
                fid=True,
                kid=True,
                prc=True,
                feature_extractor="inception-v3-compat",  # its precision and recall would take VGG-16
                feature_extractor_weights_path=weights,
                cuda=False,
                cache=False,
                batch_size=_BATCH,
                verbose=False,
                **asked["options"],
            )
            answer = {"metrics": {name: float(value) for name, value in metrics.items()}}
        else:
            pictures = ImagesPathDataset(sorted(map(str, Path(asked["pictures"]).glob("*.png"))))
            features = get_featuresdict_from_dataset(pictures, extractor, _BATCH, False, True, False)
            answer = {"means": {name: float(features[name].double().mean()) for name in _FEATURES}}
        print(json.dumps({"seconds": time.perf_counter() - start, **answer}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
