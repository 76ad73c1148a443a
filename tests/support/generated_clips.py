"""Clips for evaluations: video files without loss, and a small network of clips as a TorchScript file."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from support.make_video import write_video

FPS = 8


class I3dLike(nn.Module):
    """A module with the arguments of StyleGAN-V's I3D."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(3, 6, 3)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        x = x.float()
        if resize:
            x = nn.functional.interpolate(x, size=[x.shape[2], 20, 20], mode="trilinear", align_corners=False)
        if rescale:
            x = 2 * x / 255 - 1
        x = self.layer(x).mean([2, 3, 4])
        return x if return_features else x.softmax(1)


def save_i3d(path: Path, seed: int = 0) -> I3dLike:
    """Write a network with random weights as a TorchScript file, and return it."""
    torch.manual_seed(seed)
    network = I3dLike().eval().requires_grad_(False)
    torch.jit.script(network).save(str(path))
    return network


def features_of(network: I3dLike, clips: np.ndarray) -> np.ndarray:
    """Features (n, 6) of clips (n, f, h, w, 3) uint8, one by one."""
    media = torch.from_numpy(clips).permute(0, 4, 1, 2, 3)
    found = [network(clip[None], rescale=True, resize=True, return_features=True) for clip in media]
    return torch.cat(found).numpy()


def make_clips(count: int, num_frames: int = 9, size: tuple[int, int] = (20, 12), seed: int = 0) -> np.ndarray:
    """Random clips (count, num_frames, *size, 3) uint8, of which each has a brightness and colours of its own."""
    rng = np.random.default_rng(seed)
    values = rng.normal(128, 20, (count, num_frames, *size, 3)) + rng.normal(0, 25, (count, num_frames, 1, 1, 3))
    return values.clip(0, 255).astype(np.uint8)


def write_clip(path: Path, frames: np.ndarray, fps: float = FPS) -> Path:
    """Write a clip (f, h, w, 3) without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(path, list(frames), fps, codec="ffv1", pix_fmt="bgr0")


def write_clip_folder(folder: Path, clips: np.ndarray, captions: list[str] | None = None, fps: float = FPS) -> Path:
    """Write clips at two depths, whose sorted paths are in their order, perhaps with captions beside them."""
    for number, frames in enumerate(clips):
        path = write_clip(folder / f"{number // 5:02d}" / f"{number:04d}.mkv", frames, fps)
        if captions is not None:
            path.with_suffix(".txt").write_text(captions[number] + "\n")
    return folder


def write_clip_tar(path: Path, folder: Path) -> Path:
    """Put the files of `write_clip_folder` into a WebDataset tar."""
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*.*")):
            tar.add(file, arcname=file.name)
    return path
