"""A real dataset of captioned pictures of two sizes, and a recipe that trains on it within seconds."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np

from data_pipelines.encode.encode import encode
from pomscale.config.load import load_encode_recipe
from pomscale.media.pictures import write_png
from support.running import GLOBAL_BATCH, NUM_STEPS
from support.tiny_models import save_t5

SIZES = ((16, 16),) * 25 + ((12, 20),) * 15  # (height, width) of each picture
COLOURS = ("red", "yellow", "green", "blue", "violet")
MAX_LENGTH = 24


def make_captioned_pictures(root: Path) -> Path:
    """root/latents, by the pixel codec and a byte-level T5 of random weights in root/t5."""
    save_t5(root / "t5", 0)
    lines = ["file,caption"]
    for number, (height, width) in enumerate(SIZES):
        picture = np.zeros((height, width, 3), np.uint8)
        hue = number % len(COLOURS) / len(COLOURS)
        picture[number % height :: 4] = np.array(colorsys.hsv_to_rgb(hue, 1, 1)) * 255
        (root / "pictures").mkdir(exist_ok=True)
        write_png(root / "pictures" / f"{number:03d}.png", picture)
        lines.append(f"{number:03d}.png,{COLOURS[number % len(COLOURS)]} bars" + " and no more" * (number % 3))
    (root / "pictures.csv").write_text("\n".join(lines) + "\n")
    recipe = root / "encode.yaml"
    recipe.write_text(
        f"""
kind: encode
name: pictures
output: {root}/latents
source: {{kind: table, path: {root}/pictures.csv, root: {root}/pictures, media: "{{file}}", caption: caption}}
codec: {{name: pixel, block: 2, channels: 3}}
transform: {{kind: image, buckets: [[16, 16], [12, 20]]}}
text: {{path: {root}/t5, tokenizer: bytes, max_length: {MAX_LENGTH}, precision: fp32}}
shard_samples: 8
batch: 4
"""
    )
    encode(load_encode_recipe(recipe), progress=False)
    return root


def write_text_picture_recipe(folder: Path, pictures: Path) -> Path:
    """Every step is logged. The run folder is folder/runs/pictures."""
    recipe = folder / "pictures.yaml"
    recipe.write_text(
        f"""
kind: train
name: pictures
output: {folder}/runs
codec: {{name: pixel, block: 2, channels: 3}}
data: {{path: {pictures}/latents, normalization: dataset, flip_probability: 0}}
model:
  {{kind: image, latent_shape: [12, 8, 8], text_dim: 16, dim: 32, depth: 2, num_heads: 2}}
diffusion: {{condition_dropout: 0.2}}
optimizer: {{lr: 1e-3, weight_decay: 0.01}}
schedule: {{warmup_samples: {5 * GLOBAL_BATCH}}}
training: {{total_samples: {NUM_STEPS * GLOBAL_BATCH}, global_batch: {GLOBAL_BATCH}}}
compute: {{precision: fp32, device: cpu}}
ema: {{halflives_samples: [200]}}
checkpoint: {{every_samples: {10 * GLOBAL_BATCH}}}
monitoring: {{every_samples: {GLOBAL_BATCH}, wandb: {{mode: disabled}}}}
faults: {{preflight: false}}
"""
    )
    return recipe
