"""Measure one part of the pictures or clips: read or draw them, extract features, and keep what metrics need."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write
from pomscale.codecs.extractors.base import Extractor, FeatureName
from pomscale.evaluation.generated.metric_choice import Want, metrics_of
from pomscale.evaluation.generated.picture_sets import Batch, Failure, PictureSet, kind_of
from pomscale.evaluation.generated.pictures_hash import NOTHING, add_hashes, hash_of
from pomscale.evaluation.generated.pictures_out import PixelsOut, TarOut, clip_rate, open_tar, tar_path
from pomscale.evaluation.generated.sums import Arrays, Scores, Sum
from pomscale.evaluation.generated.work_folder import PartFiles, PartRecord
from pomscale.metrics.inception_score import InceptionScore
from pomscale.metrics.kernels import clip_score
from pomscale.metrics.moments import Moments

T = TypeVar("T")
_END: Final = object()


class TextEmbedder(Protocol):
    """An extractor whose features texts have, too."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class Measurement:
    """All that decides what is kept of pictures.

    Attributes:
        pictures: The pictures.
        extractors: The extractors.
        wants: What is kept of their features.
        batch: Pictures at once, which may change the last digits of features, and nothing else.
        splits: Split of each picture (n,) for the inception score; None if it is not measured.
        repeats_grey: Whether grey pictures are given to colour extractors with three equal channels.
        ahead: Whether a thread draws the next pictures while features are extracted.
        tars: Folder that receives the pictures as tars; None = they are not written.
        keeps_pixels: Whether the pictures are kept for an npz file.
    """

    pictures: PictureSet
    extractors: Sequence[Extractor]
    wants: Sequence[Want]
    batch: int
    splits: npt.NDArray[np.int64] | None = None
    repeats_grey: bool = False
    ahead: bool = False
    tars: Path | None = None
    keeps_pixels: bool = False

    def is_done(self, files: PartFiles, part: int) -> bool:
        """Return whether all files of a part are there."""
        return files.is_done(part) and (self.tars is None or self._tar(self.tars, part).exists())

    def _tar(self, folder: Path, part: int) -> Path:
        return tar_path(folder, part, kind_of(self.pictures))

    def measure(self, files: PartFiles, part: int, bounds: tuple[int, int], seen: Callable[[int], None]) -> None:
        """Measure pictures from bounds[0] to bounds[1] - 1, and write their files; `seen` is told each batch's number.

        Raises:
            InputError: A picture has a size or colours that an extractor does not take.
        """
        kept = _Kept(self)
        batches = self.pictures.batches(*bounds, self.batch)
        with ExitStack() as stack:
            outputs: list[TarOut | PixelsOut] = []
            if self.tars is not None:
                outputs.append(stack.enter_context(open_tar(self._tar(self.tars, part), clip_rate(self.pictures))))
            if self.keeps_pixels:
                outputs.append(PixelsOut(stack.enter_context(atomic_write(files.pixels(part)))))
            for batch in read_ahead(batches) if self.ahead else batches:
                if batch.numbers:
                    kept.add(batch)
                    for output in outputs:
                        output.add(batch)
                kept.failures += batch.failures
                seen(len(batch.numbers) + len(batch.failures))
                del batch  # before the next one is made: two batches of clips need not fit into memory
        labels: Arrays = {"labels": np.array(kept.labels, np.int64)} if kept.labels else {}
        features = {want: np.concatenate(arrays) for want, arrays in kept.features.items()}
        files.commit(part, kept.record(), kept.sums, features, labels)


@dataclass
class _Kept:
    """Sums and features of a part so far."""

    measurement: Measurement
    count: int = 0
    labels: list[int] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    sums: dict[Want, Sum] = field(default_factory=dict)
    features: dict[Want, list[np.ndarray]] = field(default_factory=dict)
    sha256: str = NOTHING

    def add(self, batch: Batch) -> None:
        self.count += len(batch.numbers)
        self.labels += batch.labels or []
        self.sha256 = add_hashes((self.sha256, hash_of(batch)))
        wants = self.measurement.wants
        for number in sorted({want.extractor for want in wants}):
            mine = [want for want in wants if want.extractor == number]
            extractor = self.measurement.extractors[number]
            names = tuple(dict.fromkeys(want.feature for want in mine))
            found = _extract(extractor, batch.pixels, names, self.measurement.repeats_grey)
            if not all(np.isfinite(features).all() for features in found.values()):
                raise InputError(
                    f"{self.measurement.pictures.name}: extractor {extractor.name} gives features that are not finite "
                    f"for some of {kind_of(self.measurement.pictures)} {batch.numbers[0]} to {batch.numbers[-1]}; look "
                    f"at them, and at the extractor's weights"
                )
            for want in mine:
                self._keep(want, found[want.feature], batch)

    def record(self) -> PartRecord:
        labels = {str(label): count for label, count in sorted(Counter(self.labels).items())}
        failures = [(failure.where, failure.reason) for failure in self.failures]
        return PartRecord(self.count, self.sha256, labels, failures)

    def _keep(self, want: Want, features: np.ndarray, batch: Batch) -> None:
        if want.kept == "features":
            self.features.setdefault(want, []).append(features)
        elif want.kept == "moments":
            if want not in self.sums:
                self.sums[want] = Moments.empty(features.shape[1])
            moments = self.sums[want]
            assert isinstance(moments, Moments)
            moments.add(features)
        elif want.kept == "splits":
            splits = self.measurement.splits
            assert splits is not None
            score = self.sums.setdefault(want, InceptionScore.empty(features.shape[1], int(splits.max()) + 1))
            assert isinstance(score, InceptionScore)
            score.add(features, splits[batch.numbers])
        else:
            scores = self.sums.setdefault(want, Scores())
            embedder: Any = self.measurement.extractors[want.extractor]
            assert isinstance(scores, Scores)
            assert batch.captions is not None
            texts = embedder.embed_texts(batch.captions).cpu().numpy()
            frames = features.reshape(len(texts), -1, features.shape[-1])
            of_frames = clip_score(frames.reshape(-1, texts.shape[1]), texts.repeat(frames.shape[1], axis=0))
            scores.add(of_frames.reshape(len(texts), -1).mean(1))


def _extract(
    extractor: Extractor, pixels: Tensor, names: tuple[FeatureName, ...], repeats_grey: bool
) -> dict[FeatureName, np.ndarray]:
    """Return features (b, d); of clips and an extractor of pictures those of all frames (b f, d), clip by clip."""
    if pixels.ndim == 5 and not extractor.takes_clips:
        frames = [_extract(extractor, clip.transpose(0, 1), names, repeats_grey) for clip in pixels]
        return {name: np.concatenate([one[name] for one in frames]) for name in names}
    if pixels.shape[1] == 1 and extractor.num_channels != 1 and repeats_grey:
        pixels = pixels.expand(-1, 3, *pixels.shape[2:])
    extractor.check_size(*pixels.shape[2:])
    return {name: features.cpu().numpy() for name, features in extractor.extract(pixels.contiguous(), names).items()}


def check_pictures(pictures: PictureSet, extractors: Sequence[Extractor], repeats_grey: bool) -> None:
    """Raise InputError if an extractor does not take pictures of this kind or size, before any work."""
    kind = kind_of(pictures)
    for extractor in extractors:
        _check_kind(pictures, extractor)
        wanted = extractor.num_channels
        if wanted == 3 and pictures.num_channels == 1 and not repeats_grey:
            raise InputError(
                f"{pictures.name}: has grey {kind}, and extractor {extractor.name} takes colours; give it three "
                f"equal channels with --grey repeat, or choose another extractor"
            )
        if wanted == 1 and pictures.num_channels == 3:
            raise InputError(
                f"{pictures.name}: has {kind} with colours, and extractor {extractor.name} takes grey ones; choose "
                f"another extractor"
            )
        if pictures.size is not None:
            extractor.check_size(*(pictures.size if extractor.takes_clips else pictures.size[-2:]))


def _check_kind(pictures: PictureSet, extractor: Extractor) -> None:
    """Raise InputError if the extractor takes clips and the set has pictures, or the other way round.

    CLIP measures the frames of clips one by one.
    """
    kind = kind_of(pictures)
    if extractor.takes_clips and kind == "pictures":
        raise InputError(f"--extractor {extractor.name}: it takes clips, and {pictures.name} has pictures")
    if kind == "clips" and not extractor.takes_clips and extractor.name != "clip":
        raise InputError(
            f"--extractor {extractor.name}: it takes pictures, and {pictures.name} has clips, of which "
            f"{', '.join(metrics_of(kind))} are measured: with torchscript:FILE, a network of clips, and clip:FOLDER"
        )


def read_ahead(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Yield items that a thread takes from an iterator before they are asked for; the errors of either are raised."""
    with ThreadPoolExecutor(1, "ahead") as pool:
        waiting = deque(pool.submit(next, items, _END) for _ in range(depth))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, items, _END))
            yield item  # type: ignore[misc]
