"""torch-fidelity as a rival of `evaluate images`: features alone, and whole evaluations, of the same PNGs.

Both take the same weights file, with random values, in one process of as many threads each; they are measured in turns,
since the speed of a shared machine drifts.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pomscale.base.errors import InputError, PomscaleError
from pomscale.benchmarks import torch_fidelity_rival
from pomscale.benchmarks.report import BenchReport
from pomscale.codecs.extractors import Extractor, build_extractor
from pomscale.codecs.extractors.inception_network import InceptionNetwork
from pomscale.evaluation.generated.evaluate import evaluate
from pomscale.evaluation.generated.evaluation import Evaluation
from pomscale.evaluation.generated.figures import Conventions
from pomscale.evaluation.generated.request import Request

_SIZE = 256
_BATCH = 64
_WANTED = 1.3
_MEAN_TOLERANCE = 1e-4  # relative, of the mean of all features
_METRIC_TOLERANCE = 1e-3  # relative
_KID_SUBSETS = (20, 100)
_METRICS = {
    "fid": "frechet_inception_distance",
    "inception_score": "inception_score_mean",
    "kid": "kernel_inception_distance_mean",
    "precision": "precision",
    "recall": "recall",
}
"""Our names of the metrics, and theirs."""


class Rival:
    """A process that has torch-fidelity, and measures folders of PNGs when it is asked."""

    def __init__(self, python: Path, weights: Path, num_threads: int) -> None:
        """Start it, and wait until it is ready. InputError if it cannot run torch-fidelity."""
        command = [str(python), torch_fidelity_rival.__file__, str(weights), str(num_threads)]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise InputError(f"--rival: {python} cannot be started ({error})") from error
        if self._line() != "ready":
            self._process.wait()
            raise InputError(
                f"--rival: {python} has no torch-fidelity: pip install torch-fidelity==0.4.0 torchvision there"
            )

    def features(self, pictures: Path) -> dict[str, Any]:
        """Return "seconds", and "means" of pooled features and logits of all pictures in a folder."""
        return self._ask({"pictures": str(pictures)})

    def metrics(self, pictures: Path, reference: Path) -> dict[str, Any]:
        """Return "seconds", and "metrics" by their names, of one folder beside another."""
        number, size = _KID_SUBSETS
        kid = {"kid_subsets": number, "kid_subset_size": size}
        return self._ask({"pictures": str(pictures), "reference": str(reference), "options": kid})

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        line = self._line()
        if not line:
            raise PomscaleError("--rival: torch-fidelity failed, see above: no figure")
        return dict(json.loads(line))

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def compare_features(report: BenchReport, rival: Rival, weights: Path, pictures: Path, num_turns: int) -> None:
    """Add rows of pictures per second of both extractors, and compare their features' means."""
    ours = build_extractor(f"inception:{weights}")
    found: dict[str, list[dict[str, Any]]] = {"torch-fidelity": [], "pomscale": []}
    for _ in range(num_turns):
        found["torch-fidelity"].append(rival.features(pictures))
        found["pomscale"].append(_extract(ours, pictures))
    _add_speeds(report, "features", found, len(list(pictures.iterdir())))
    for feature, expected in found["torch-fidelity"][0]["means"].items():
        value = found["pomscale"][0]["means"][feature]
        if abs(value - expected) > _MEAN_TOLERANCE * abs(expected):
            report.failures.append(f"the mean of {feature} is {value}, and torch-fidelity's {expected}")


def compare_evaluations(
    report: BenchReport, rival: Rival, weights: Path, sides: tuple[Path, Path], num_turns: int
) -> None:
    """Add rows of pictures per second of whole evaluations, and compare their metrics.

    Args:
        report: The report.
        rival: The process of torch-fidelity.
        weights: Weights of the network.
        sides: Folders of the pictures and of the reference, as many in each.
        num_turns: Turns of each; the fastest counts.
    """
    pictures, reference = sides
    found: dict[str, list[dict[str, Any]]] = {"torch-fidelity": [], "pomscale": []}
    for turn in range(num_turns):
        found["torch-fidelity"].append(rival.metrics(pictures, reference))
        found["pomscale"].append(_evaluate(weights, sides, pictures.parent / f"work-{turn}"))
    _add_speeds(report, "whole evaluation", found, 2 * len(list(pictures.iterdir())))
    ours, theirs = (found[name][0]["metrics"] for name in ("pomscale", "torch-fidelity"))
    for name, their_name in _METRICS.items():
        difference = abs(ours[name] - theirs[their_name]) / max(abs(theirs[their_name]), 1e-12)
        report.add(f"  {name}", pomscale=ours[name], torch_fidelity=theirs[their_name], difference=difference)
        if difference > _METRIC_TOLERANCE:
            report.failures.append(f"{name} is {ours[name]}, and torch-fidelity's {theirs[their_name]}")


def _add_speeds(report: BenchReport, what: str, found: dict[str, list[dict[str, Any]]], count: int) -> None:
    least = {name: min(turn["seconds"] for turn in turns) for name, turns in found.items()}
    for name, turns in found.items():
        seconds = [round(turn["seconds"], 2) for turn in turns]
        report.add(f"{what} of {count} pictures, {name}", pictures_per_s=count / least[name], turns_s=seconds)
    report.compare(f"{what} beside torch-fidelity", least["torch-fidelity"] / least["pomscale"], _WANTED)


def _extract(extractor: Extractor, folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    parts = []
    files = sorted(folder.glob("*.png"))
    for first in range(0, len(files), _BATCH):
        pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files[first : first + _BATCH]]
        media = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        parts.append(extractor.extract(media, ("pooled", "logits")))
    seconds = time.perf_counter() - start
    pooled, logits = (torch.cat([part[name] for part in parts]).double().mean() for name in ("pooled", "logits"))
    return {"seconds": seconds, "means": {"2048": float(pooled), "logits_unbiased": float(logits)}}


def _evaluate(weights: Path, sides: tuple[Path, Path], work: Path) -> dict[str, Any]:
    start = time.perf_counter()
    pictures, reference = map(str, sides)
    request = Request(
        source=pictures,
        reference=reference,
        extractors=(f"inception:{weights}",),
        metrics=tuple(_METRICS),
        conventions=Conventions(kid_subsets=_KID_SUBSETS),
        work=work,
    )
    outcome = evaluate(Evaluation(request), progress=False)
    assert outcome.result is not None
    return {"seconds": time.perf_counter() - start, "metrics": outcome.result["metrics"]}


def write_pictures(folder: Path, count: int, num_waves: int = 24) -> Path:
    """Write PNGs of 256x256 smooth noise, `num_waves` values a side, which decode as fast as photographs do."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (num_waves, num_waves, 3), dtype=np.uint8))
        coarse.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.png")
    return folder


def write_weights(file: Path) -> Path:
    """Write a weights file of the network with random values that keep the size of activations."""
    with torch.device("meta"):
        shapes = InceptionNetwork().file_shapes()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            tensors[name] = torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
        else:
            tensors[name] = torch.ones(shape) if name.endswith(("bn.weight", "running_var")) else torch.zeros(shape)
    torch.save(tensors, file)
    return file
