#!/usr/bin/env bash
# torchmetrics 1.9.0: CLIPScore clamps the mean over all pairs at 0, and not each pair's score as it documents.
#
# The documentation defines CLIPScore(I, C) = max(100 * cos(E_I, E_C), 0) for a pair, and the metric as its mean. Two pairs
# with cosines 1 and -0.6 then have (100 + 0) / 2 = 50; the code adds 100 * cos and clamps the mean at the end: 20. The
# functional form does the same. Both agree unless a cosine is negative. The model here gives the embeddings themselves,
# as the argument `model_name_or_path` allows.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q torchmetrics==1.9.0 transformers==5.23.0
cd "$work"
cat >score.py <<'PYTHON'
import sys

import torch
import torchmetrics
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.multimodal import CLIPScore

TEXTS = {"right": (1.0, 0.0), "wrong": (-0.6, 0.8)}


class Embeddings(torch.nn.Module):
    """Pictures have the embedding (1, 0); texts have those of the table."""

    config = None

    def get_image_features(self, pixel_values):
        return torch.tensor([[1.0, 0.0]]).repeat(len(pixel_values), 1)

    def get_text_features(self, input_ids, attention_mask):
        return torch.tensor([list(TEXTS.values())[i] for i in input_ids[:, 0]])


def process(images=None, text=None, **_):
    """Return what a CLIP processor returns."""
    if images is not None:
        return {"pixel_values": torch.stack(images)}
    rows = torch.tensor([[list(TEXTS).index(word)] for word in text])
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def build():
    return Embeddings(), process


pictures = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
metric = CLIPScore(model_name_or_path=build)
metric.update(pictures, list(TEXTS))
found = metric.compute().item()
functional = clip_score(pictures, list(TEXTS), model_name_or_path=build).item()
alone = [clip_score(pictures[:1], [word], model_name_or_path=build).item() for word in TEXTS]
print(f"torchmetrics {torchmetrics.__version__}: pairs alone {alone}, both {found:.4g}, functional {functional:.4g}")
as_found = [round(x, 3) for x in (*alone, found, functional)] == [100, 0, 20, 20]
print("as found" if as_found else "CHANGED: the score of two pairs is no longer the clamped mean")
sys.exit(0 if as_found else 1)
PYTHON
venv/bin/python score.py
