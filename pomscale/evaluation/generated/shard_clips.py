"""Clips of a dataset of shards, decoded by the codec that made their latents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pomscale.base.errors import InputError
from pomscale.codecs.base import ClipCodec
from pomscale.distributed.world import resolve_device
from pomscale.evaluation.generated.clip_frames import decode_frames
from pomscale.evaluation.generated.picture_sets import Batch, Failure, Frames
from pomscale.evaluation.generated.shard_pictures import codec_of
from pomscale.evaluation.generated.shard_set import ShardSet
from pomscale.shards.schema import Manifest, check_has_latents


class ShardClips(ShardSet):
    """The clips of a dataset. Where moments are stored, a posterior sample is decoded, keyed by the record.

    Those that are shorter than what is measured count as clips that cannot be read.
    """

    has_captions = False

    def __init__(
        self,
        location: str,
        manifest: Manifest,
        frames: Frames,
        *,
        num: int | None = None,
        device: str = "cpu",
        codec_path: str | None = None,
    ) -> None:
        """Open a dataset.

        Args:
            location: Folder or URL.
            manifest: Its manifest.
            frames: The frames that are measured.
            num: Number of clips that are measured, taken at equal distances; None = all.
            device: Device of the codec, "auto", "cpu" or "cuda".
            codec_path: Location of the codec's weights on this machine, if they have moved.

        Raises:
            InputError: It has clips of several sizes, or of too few frames alone, or its codec is not here.
        """
        self.frames, self.fps = frames, manifest.fps
        check_has_latents(location, manifest)
        self.size: tuple[int, ...] = (frames.num, *_only_size(location, manifest, frames))
        super().__init__(location, manifest, num, "clips")
        self._ends = np.cumsum([shard.num_samples for shard in manifest.shards])
        codec = codec_of(location, manifest, codec_path).to(resolve_device(device))
        assert isinstance(codec, ClipCodec), "recipes with another codec are refused"
        self._codec = codec
        self.num_channels = codec.num_channels_in

    def batches(self, begin: int, end: int, batch: int) -> Iterator[Batch]:
        """Yield decoded clips."""
        for first in range(begin, end, batch):
            yield self._batch(np.arange(first, min(first + batch, end)))

    @torch.inference_mode()
    def _batch(self, numbers: np.ndarray) -> Batch:
        records = self._records(numbers.tolist())
        shards = np.searchsorted(self._ends, records, side="right").tolist()
        groups = np.array([self.manifest.shards[shard].group for shard in shards])
        pixels = torch.empty(len(numbers), self.num_channels, *self.size, dtype=torch.uint8)
        reasons: dict[int, str] = {}
        for group in np.unique(groups).tolist():
            rows, num_frames = np.flatnonzero(groups == group), self.manifest.groups[group].target[0]
            if num_frames < self.frames.span:
                reasons |= {row: f"has {num_frames} frames, needs {self.frames.span}" for row in rows.tolist()}
            else:
                reasons |= self._decode(records[rows], rows, pixels)
        whole = [row for row in range(len(numbers)) if row not in reasons]
        return Batch(
            numbers[whole].tolist(),
            pixels[whole] if reasons else pixels,
            failures=[Failure(f"record {records[row]}", reasons[row]) for row in sorted(reasons)],
        )

    def _decode(self, records: np.ndarray, rows: np.ndarray, pixels: torch.Tensor) -> dict[int, str]:
        """Decode records of one shape, each by itself, into rows of `pixels`; return why others cannot be read."""
        samples = self._dataset.read(records, records, seed=0, flip_probability=0.0)
        for number, row in enumerate(rows.tolist()):
            if number not in samples.bad:
                latents = samples.latents[number : number + 1].float().to(self._codec.device)
                decoder, out = self._codec.decoder(latents.shape[2]), pixels[row : row + 1]
                decode_frames(self.name, decoder, latents.split(1, dim=2), self.frames, out)
        return {int(rows[number]): bad.reason for number, bad in samples.bad.items()}


def _only_size(location: str, manifest: Manifest, frames: Frames) -> tuple[int, ...]:
    """Return the height and width of all clips. InputError if they differ, or if all clips are too short."""
    targets = {manifest.groups[shard.group].target for shard in manifest.shards}
    sizes = {target[-2:] for target in targets}
    if len(sizes) != 1:
        shown = ", ".join("x".join(map(str, size)) for size in sorted(sizes))
        raise InputError(f"dataset {location}: has clips of sizes {shown}; clips of one size are measured")
    longest = max(target[0] for target in targets)
    if longest < frames.span:
        raise InputError(
            f"dataset {location}: its clips have {longest} frames, and {frames.span} are needed ({frames}); measure "
            f"fewer frames, or name a dataset of longer clips"
        )
    return next(iter(sizes))
