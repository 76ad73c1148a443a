"""Peak memory of one encode, in a process of its own: `python -m support.encode_memory NAME (plain|sliced)`.

plain: the network's encoder on all frames at once. sliced: codec vae, with the network of `MEMORY_VAES`. It prints the
bytes that the encode took on top of what the process held before.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pomscale.codecs.vae import ClipVae, open_vae
from pomscale.config.codecs import VaeCodecConfig
from support.tiny_vaes import save_tiny_vae

# name: changes to the network of that name: activations of many channels at full size, as the real ones have.
MEMORY_VAES: dict[str, dict[str, Any]] = {
    "cogvideox": {"block_out_channels": (32, 32, 32), "norm_num_groups": 8},
    "wan21": {"base_dim": 32},
    "wan22": {"base_dim": 32},
    "hunyuan_video": {"block_out_channels": (32, 32, 32, 32), "norm_num_groups": 8},
    "hunyuan_video_15": {"block_out_channels": (32, 32, 64, 64, 64)},
    "ltx": {"block_out_channels": (256, 256, 256, 256), "spatio_temporal_scaling": (True, True, True, False)},
    "mochi": {"encoder_block_out_channels": (64, 128, 128, 128)},
}

# (height, width) of the clips, of as many frames near 80 as fit.
MEMORY_SIZE = (64, 96)


def num_frames(codec: ClipVae) -> int:
    """The smallest fitting number from 80 on."""
    return codec.frames.fitting(80)[-1]


def plain_encode(codec: ClipVae) -> Callable[[Tensor], Tensor]:
    """Return the encoder on all frames at once, to moments before quantisation.

    CogVideoX normalises over the frames that it is given, so these are other latents than with 8 at a time. Wan takes
    the first frame by itself, and then any number of fours; the latents are the same.
    """
    vae = codec.vae

    def of_wan(pixels: Tensor) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify  # noqa: PLC0415 (large)

        pixels = patchify(pixels, vae.config.patch_size or 1)
        past: list[Any] = [None] * vae._cached_conv_counts["encoder"]
        parts = (pixels[:, :, :1], pixels[:, :, 1:])
        return torch.cat([vae.encoder(part, feat_cache=past, feat_idx=[0]) for part in parts if part.shape[2]], dim=2)

    def of_others(pixels: Tensor) -> Tensor:
        moments = vae.encoder(pixels)
        return moments[0] if isinstance(moments, tuple) else moments

    return of_wan if codec.class_name == "AutoencoderKLWan" else of_others


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the bytes by which the resident memory rises, at most, while `run` works. Linux."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main(name: str, way: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        codec = open_vae(
            VaeCodecConfig(
                name="vae", path=str(save_tiny_vae(Path(folder), name, **MEMORY_VAES[name])), store="moments"
            )
        )
    assert isinstance(codec, ClipVae)
    codec.to("cpu")
    clip = torch.rand(1, 3, num_frames(codec), *MEMORY_SIZE)
    encode = plain_encode(codec) if way == "plain" else codec.encode
    with torch.no_grad():
        encode(clip[:, :, :1])  # what libraries set up at the first call
        print(peak_bytes(lambda: encode(clip)))


if __name__ == "__main__":
    main(*sys.argv[1:])
