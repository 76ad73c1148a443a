"""Peak memory of encoding one clip, counted on networks of the published sizes without computing anything.

Networks and clips are meta tensors, and `Tally` counts the bytes of tensors that are alive after every operation: what
an accelerator's allocator would hold besides the workspaces of kernels. `python -m support.encode_memory` prints all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pomscale.codecs.vae import ClipVae
from pomscale.codecs.vae_conventions import CONVENTIONS
from pomscale.config.codecs import VaeCodecConfig

# name: (class of diffusers, settings beyond its defaults, which are those of the published network).
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "CogVideoX": ("AutoencoderKLCogVideoX", {}),
    "Wan 2.1": ("AutoencoderKLWan", {}),
    "Wan 2.2": (
        "AutoencoderKLWan",
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
    ),
    "HunyuanVideo": ("AutoencoderKLHunyuanVideo", {}),
    "HunyuanVideo 1.5": ("AutoencoderKLHunyuanVideo15", {}),
    "LTX": ("AutoencoderKLLTXVideo", {}),
    "Mochi": ("AutoencoderKLMochi", {}),
}

SIZE = (256, 384)


class Tally(TorchDispatchMode):
    """Count the bytes of the tensors that operations make, while they are alive; `peak` is the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._alive[reference.cdata] = (reference, storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._alive.values()))
        return out


def open_published(name: str) -> ClipVae:
    """Return codec vae with a network of the published size and no weights."""
    import diffusers  # noqa: PLC0415 (optional)

    class_name, settings = PUBLISHED[name]
    with torch.device("meta"):
        network = getattr(diffusers, class_name)(**settings).eval().requires_grad_(False)
    if class_name == "AutoencoderKLLTXVideo":  # statistics, whose numbers the codec reads
        network.latents_mean, network.latents_std = torch.zeros(128), torch.ones(128)
    config = VaeCodecConfig(name="vae", path="none", store="moments")
    return ClipVae(config, network, class_name, CONVENTIONS[class_name])


def num_frames(codec: ClipVae) -> int:
    """Return the smallest number that fits from 80 on."""
    return codec.frames.fitting(80)[-1]


def plain_encode(codec: ClipVae) -> Callable[[Tensor], object]:
    """Return the encoder on all frames at once.

    CogVideoX normalises over the frames that it is given, so its latents are others than with 8 at a time. Wan takes
    the first frame by itself, and then any number of fours, to the same latents.
    """
    vae = codec.vae

    def of_wan(pixels: Tensor) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify  # noqa: PLC0415 (optional)

        pixels = patchify(pixels, vae.config.patch_size or 1)
        past: list[Any] = [None] * vae._cached_conv_counts["encoder"]
        parts = (pixels[:, :, :1], pixels[:, :, 1:])
        return torch.cat([vae.encoder(part, feat_cache=past, feat_idx=[0]) for part in parts], dim=2)

    return of_wan if codec.class_name == "AutoencoderKLWan" else vae.encoder


@torch.no_grad()
def peaks(name: str) -> tuple[int, int]:
    """Return the peaks in bytes of one clip at once, and through codec vae."""
    codec = open_published(name)
    clip = torch.empty(1, 3, num_frames(codec), *SIZE, device="meta")
    found = []
    for encode in (plain_encode(codec), codec._encode):
        with Tally() as tally:
            encode(clip)
        found.append(tally.peak)
    return found[0], found[1]


def main() -> None:
    for name in PUBLISHED:
        plain, sliced = peaks(name)
        clip = f"{num_frames(open_published(name))} frames of {SIZE[0]}x{SIZE[1]}"
        ways = f"at once {plain / 2**30:.2f} GiB, in slices {sliced / 2**30:.2f} GiB"
        print(f"{name}: {clip}, {ways}, {sliced / plain:.3f}", flush=True)


if __name__ == "__main__":
    main()
