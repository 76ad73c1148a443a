"""Pictures of a dataset of shards, decoded by the codec that made its latents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pomscale.base.errors import InputError
from pomscale.codecs import build_codec
from pomscale.codecs.base import Codec
from pomscale.config.codecs import PixelCodecConfig, Uint8CodecConfig
from pomscale.distributed.world import resolve_device
from pomscale.evaluation.generated.picture_sets import Batch, Failure, to_pixels
from pomscale.evaluation.generated.shard_set import ShardSet
from pomscale.shards.schema import Manifest, check_has_latents, read_manifest


class ShardPictures(ShardSet):
    """The pictures of a dataset. Where moments are stored, a posterior sample is decoded, keyed by the record."""

    has_captions = False
    frames = None
    fps = None

    def __init__(
        self, location: str, *, num: int | None = None, device: str = "cpu", codec_path: str | None = None
    ) -> None:
        """Open a dataset.

        Args:
            location: Folder or URL.
            num: Number of pictures that are measured, taken at equal distances; None = all.
            device: Device of the codec, "auto", "cpu" or "cuda".
            codec_path: Location of the codec's weights on this machine, if they have moved.

        Raises:
            InputError: It is no dataset of pictures of one size, or its codec is not here.
        """
        manifest = read_manifest(location)
        check_has_latents(location, manifest)
        self.size: tuple[int, ...] = _only_size(location, manifest)
        super().__init__(location, manifest, num, "pictures")
        self._codec = codec_of(location, manifest, codec_path).to(resolve_device(device))
        self.num_channels = self._codec.num_channels_in

    def batches(self, begin: int, end: int, batch: int) -> Iterator[Batch]:
        """Yield decoded pictures."""
        for first in range(begin, end, batch):
            numbers = np.arange(first, min(first + batch, end))
            records = self._records(numbers.tolist())
            samples = self._dataset.read(records, records, seed=0, flip_probability=0.0)
            whole = [row for row in range(len(records)) if row not in samples.bad]
            with torch.inference_mode():
                latents = samples.latents[whole].float().to(self._codec.device)
                pixels = (
                    to_pixels(self.name, self._codec.decode(latents)) if whole else torch.empty(0, dtype=torch.uint8)
                )
            yield Batch(
                numbers[whole].tolist(),
                pixels,
                samples.labels[whole].tolist() if self.manifest.num_classes else None,
                failures=[Failure(f"record {bad.record}", bad.reason) for bad in samples.bad.values()],
            )


def _only_size(location: str, manifest: Manifest) -> tuple[int, ...]:
    sizes = {manifest.groups[shard.group].target for shard in manifest.shards}
    if manifest.modality != "image" or len(sizes) != 1:
        shown = ", ".join("x".join(map(str, size)) for size in sorted(sizes))
        raise InputError(
            f"dataset {location}: has {manifest.modality}s of sizes {shown}; pictures of one size are measured"
        )
    return next(iter(sizes))


def codec_of(location: str, manifest: Manifest, codec_path: str | None) -> Codec:
    """Return the codec that made the latents of a dataset, on the CPU. InputError if it is not here."""
    config = manifest.latent_codec.config
    if codec_path is not None and not isinstance(config, PixelCodecConfig | Uint8CodecConfig):
        config = config.model_copy(update={"path": codec_path})
    codec = build_codec(config)
    if codec.identity() != manifest.latent_codec.identity:
        raise InputError(
            f"dataset {location}: codec {codec.name} has not the weights that made its latents, so pictures would come "
            f"out wrong; name the right ones with --codec-path"
        )
    return codec
