"""A real dataset of captioned clips of three lengths, and a recipe that trains on it within seconds."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np

from data_pipelines.encode.encode import encode
from pomscale.config.load import load_encode_recipe
from support.make_video import write_video
from support.running import GLOBAL_BATCH, NUM_STEPS
from support.tiny_models import save_t5, save_video_vae

NUM_FRAMES = (16,) * 22 + (8,) * 14 + (1,) * 9  # of each clip; one frame is a picture
COLOURS = ("red", "yellow", "green", "blue", "violet")


def make_clips(root: Path) -> Path:
    """root/latents, by a causal video VAE and a byte-level T5 of random weights in root/vae and root/t5."""
    save_video_vae(root / "vae", 0)
    save_t5(root / "t5", 0)
    (root / "clips").mkdir()
    for number, num_frames in enumerate(NUM_FRAMES):
        write_video(root / "clips" / f"{number:03d}.mp4", _rising_bar(number, num_frames), 8)
        colour = COLOURS[number % len(COLOURS)]
        (root / "clips" / f"{number:03d}.txt").write_text(f"a {colour} bar" + " that rises" * (number % 3))
    recipe = root / "encode.yaml"
    recipe.write_text(
        f"""
kind: encode
name: clips
output: {root}/latents
source: {{kind: video_folder, path: {root}/clips, captions: true}}
codec: {{name: vae, path: {root}/vae, subfolder: "", precision: fp32}}
transform: {{kind: video, fps: 8, buckets: [[16, 24, 32], [8, 24, 32], [1, 24, 32]]}}
text: {{path: {root}/t5, tokenizer: bytes, max_length: 24, precision: fp32}}
shard_samples: 8
batch: 4
"""
    )
    encode(load_encode_recipe(recipe), progress=False)
    return root


def _rising_bar(number: int, num_frames: int) -> list[np.ndarray]:
    colour = np.array(colorsys.hsv_to_rgb(number % len(COLOURS) / len(COLOURS), 1, 1)) * 255
    frames = []
    for frame in range(num_frames):
        picture = np.zeros((24, 32, 3), np.uint8)
        top = 20 - (number + frame) % 20
        picture[top : top + 4] = colour
        frames.append(picture)
    return frames


def write_video_recipe(folder: Path, clips: Path) -> Path:
    """Every step is logged. The run folder is folder/runs/clips."""
    recipe = folder / "clips.yaml"
    recipe.write_text(
        f"""
kind: train
name: clips
output: {folder}/runs
codec: {{name: vae, path: {clips}/vae, subfolder: "", precision: fp32}}
data: {{path: {clips}/latents, normalization: dataset}}
model:
  {{kind: video, latent_shape: [4, 4, 6, 8], text_dim: 16, dim: 32, depth: 2, num_heads: 2, temporal: block_causal}}
diffusion: {{max_start_group: 3}}
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
