"""Fit the network of the extractor `digits` on the held-out half of the handwritten digits, and write its weights.

    python -m data_pipelines.demos.digits_network [OUT]

pomscale/codecs/extractors/digits.safetensors was made by this. Losses and their order of summation differ between
machines, and so would the weights; that is why the package has them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from data_pipelines.demos.digits import read_digits
from pomscale.base.errors import PomscaleError
from pomscale.codecs.extractors.digits import WEIGHTS, DigitsNetwork

_SEED = 0
_NUM_STEPS = 3000
_BATCH = 128
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.02


def halves() -> dict[str, tuple[Tensor, Tensor]]:
    """Return pictures (n, 1, 8, 8) fp32 in [0, 1] and labels (n,) of both halves."""
    digits = list(read_digits())
    found = {}
    for half in ("train", "heldout"):
        members = [digit for digit in digits if digit.half == half]
        pictures = torch.from_numpy(np.stack([digit.pixels for digit in members]))[:, None] / 255.0
        found[half] = pictures, torch.tensor([digit.label for digit in members])
    return found


def fit(pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return weights in fp16, fitted on pictures that are shifted by up to a pixel either way."""
    generator = torch.Generator().manual_seed(_SEED)
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        network = DigitsNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_NUM_STEPS)
    shifted = [pad(pictures, (1, 1, 1, 1))[..., y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    choices = torch.stack(shifted)  # (9, n, 1, 8, 8)
    for _ in range(_NUM_STEPS):
        members = torch.randint(len(labels), (_BATCH,), generator=generator)
        shifts = torch.randint(len(choices), (_BATCH,), generator=generator)
        loss = cross_entropy(network(choices[shifts, members])[1], labels[members], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}


def accuracy(weights: dict[str, Tensor], pictures: Tensor, labels: Tensor) -> float:
    """Return the share of pictures whose class is recognised."""
    network = DigitsNetwork()
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    with torch.no_grad():
        return float((network(pictures)[1].argmax(1) == labels).float().mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=WEIGHTS, help="file that receives the weights")
    out: Path = parser.parse_args().out
    try:
        both = halves()
    except PomscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    torch.set_num_threads(1)
    weights = fit(*both["heldout"])
    save_file(weights, out)
    for half, (pictures, labels) in both.items():
        print(f"{half}: {accuracy(weights, pictures, labels):.2%} of {len(labels)} recognised")
    return 0


if __name__ == "__main__":
    sys.exit(main())
