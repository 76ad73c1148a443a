"""Encode the parts of one task: threads decode ahead (`media_loader`), this one feeds the networks, another one writes.

Batches never cross a part, so a part's bytes do not depend on which parts came before it; decoding does cross, so the
networks are not kept waiting at the borders.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipelines.encode.media_loader import Loaded, MediaLoader, Pixels
from data_pipelines.encode.progress import EncodeProgress
from data_pipelines.encode.setup import EncodeSetup, check_items_in_place
from data_pipelines.shards.finite import is_finite, why_not_finite
from data_pipelines.shards.writers import PartWriter, Record
from pomscale.base.errors import PomscaleError
from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.codecs.base import SingleTextEncoder
from pomscale.shards.schema import CAPTIONS_FIELD, ArrayName, array_members
from pomscale.sources.protocol import Item

# Batches that may wait for the writer; each is small beside the decoded media that wait for the networks.
_MAX_WAITING_WRITES = 8


@dataclass
class PartWork:
    """A part that this task has claimed, and its writers by variant."""

    part: int
    writers: dict[int, PartWriter]
    captioned: list[Loaded] = field(default_factory=list)
    batches: dict[tuple[int, int], list[Loaded]] = field(default_factory=dict)  # by variant and group
    has_gone: bool = False  # whether a listed file is gone

    @property
    def first_variant(self) -> int:
        return min(self.writers)


@dataclass(frozen=True, slots=True)
class _Launched:
    """A batch whose latents the device may still be computing."""

    work: PartWork
    variant: int
    group: int
    entries: list[Loaded]
    media: list[Pixels]
    arrays: dict[ArrayName, Tensor]
    """Latents or features; {} where the pixels themselves are stored, which are then in `media`."""


class PartEncoder:
    """Encodes parts; call `run` once. `stop` is asked between items; a part that is not finished then is abandoned."""

    def __init__(self, setup: EncodeSetup, display: EncodeProgress, stop: Callable[[], bool] = lambda: False) -> None:
        self._setup = setup
        self._recipe = setup.recipe
        self._codec = setup.encoders.codec
        self._features = setup.encoders.features
        self._texts = setup.encoders.texts
        self._display = display
        self._stop = stop
        self._launched: _Launched | None = None
        self._writes: deque[Future[None]] = deque()
        self._broken = False
        self._open: list[PartWork] = []
        self._loader = MediaLoader(setup, display.waited)
        self._writer = ThreadPoolExecutor(1, "write")

    def run(self, parts: Iterable[tuple[int, list[int]]], done: Callable[[int], None]) -> None:
        """Make parts, given with the variants that lack them; `done(part)` is called after each commit.

        Raises PomscaleError where the disk is full, storage fails or a batch is too large for the device.
        """
        try:
            for work, entry in self._loader.load(self._begun(parts)):
                if self._stop():
                    return
                if entry is None:
                    self._finish(work, done)
                elif entry.failure is not None:
                    self._give_up(work, entry, entry.failure)
                else:
                    self._display.has_audio |= entry.has_audio
                    self._add(work, entry)
            while self._writes:
                self._writes.popleft().result()
        finally:
            self._broken = True
            self._loader.close()
            self._writer.shutdown()
            for work in self._open:
                for writer in work.writers.values():
                    writer.abandon()

    # -- encode ----------------------------------------------------------------------------------------------------

    def _begun(self, parts: Iterable[tuple[int, list[int]]]) -> Iterator[tuple[PartWork, range, list[int]]]:
        for part, variants in parts:
            yield self._begin(part, variants), self._setup.positions(part), variants

    def _begin(self, part: int, variants: list[int]) -> PartWork:
        moments = self._codec is not None and self._codec.stores_moments
        stores, members = self._setup.stores, array_members(self._setup.arrays, self._setup.coding)
        work = PartWork(part, {number: PartWriter(stores[number], part, members, moments) for number in variants})
        self._open.append(work)
        self._display.begin()
        return work

    def _add(self, work: PartWork, entry: Loaded) -> None:
        if not self._texts:
            self._route(work, entry)
            return
        work.captioned.append(entry)
        if len(work.captioned) == self._recipe.batch:
            self._embed(work)

    def _embed(self, work: PartWork) -> None:
        """Embed the captions of a batch of items, whatever their groups, and route each item to its group."""
        entries, work.captioned = work.captioned, []
        if not entries or not self._texts:
            return
        texts = [_texts(entry.item, self._recipe.captions) for entry in entries]
        captions = [text for of_item in texts for text in of_item]
        self._count_cut(captions)
        for encoder, names in zip(self._texts, self._setup.texts, strict=True):
            embeddings = self._embeddings(encoder, captions)
            for entry, of_item in zip(entries, texts, strict=True):
                entry.texts |= zip(names, itertools.islice(embeddings, len(of_item)), strict=False)
        for entry in entries:
            self._route(work, entry)

    def _count_cut(self, captions: list[str]) -> None:
        """Count the captions that some encoder cuts."""
        lengths = [[length > one.max_tokens for length in one.num_tokens(captions)] for one in self._texts]
        self._display.cut(sum(any(is_cut) for is_cut in zip(*lengths, strict=True)))

    def _embeddings(self, encoder: SingleTextEncoder, texts: list[str]) -> Iterator[np.ndarray]:
        batch = self._recipe.batch
        for begin in range(0, len(texts), batch):
            for embedding in self._on_device(encoder.encode, texts[begin : begin + batch]):
                with np.errstate(over="ignore"):  # values that do not fit become infinite, and `_store` lists the item
                    yield embedding.astype(np.float16)

    def _route(self, work: PartWork, entry: Loaded) -> None:
        for number in work.writers:
            group = entry.media[number].group if entry.media else 0
            batch = work.batches.setdefault((number, group), [])
            batch.append(entry)
            if len(batch) == self._recipe.batch:
                self._encode(work, number, group)

    def _encode(self, work: PartWork, variant: int, group: int) -> None:
        """Launch a batch, then hand the one before it to the writer, so that the device has work meanwhile."""
        entries = work.batches.pop((variant, group))
        arrays: dict[ArrayName, Tensor] = {}
        media: list[Pixels] = []
        if self._codec is not None and self._codec.stored_dtype == "uint8":
            media = [entry.media.pop(variant) for entry in entries]
        elif self._codec is not None:
            arrays = self._on_device(self._latents, entries, variant, group)
        elif self._features is not None:
            arrays = self._on_device(self._feature_arrays, entries, variant)
        for entry in entries:
            entry.media.pop(variant, None)  # the pixels are no longer needed
        previous, self._launched = self._launched, _Launched(work, variant, group, entries, media, arrays)
        self._hand_over(previous)

    def _latents(self, entries: list[Loaded], variant: int, group: int) -> dict[ArrayName, Tensor]:
        assert self._codec is not None
        pixels = torch.from_numpy(np.stack([entry.media[variant].values for entry in entries]))
        if self._codec.device.type == "cuda":
            pixels = pixels.pin_memory().to(self._codec.device, non_blocking=True)
        images = pixels.movedim(-1, 1).float() / 255.0
        shape = self._setup.variants[variant].latent_shapes[group]
        arrays: dict[ArrayName, Tensor] = {"latent": self._stored(images, entries, shape, mirrored=False)}
        if "flip" in self._setup.encoders.arrays:
            arrays["flip"] = self._stored(images.flip(-1), entries, shape, mirrored=True)
        return arrays

    def _feature_arrays(self, entries: list[Loaded], variant: int) -> dict[ArrayName, Tensor]:
        """Return a teacher's features, float16, of the media, and of the mirrored ones where those are stored."""
        assert self._features is not None
        media = torch.from_numpy(np.stack([entry.media[variant].values for entry in entries])).movedim(-1, 1)
        arrays: dict[ArrayName, Tensor] = {"features": self._features.encode(media).to(torch.float16)}
        if "features_flip" in self._setup.encoders.arrays:
            arrays["features_flip"] = self._features.encode(media.flip(-1)).to(torch.float16)
        return arrays

    def _stored(self, images: Tensor, entries: list[Loaded], shape: tuple[int, ...], mirrored: bool) -> Tensor:
        """Return float16 latents as they are stored. Posterior draws are keyed by item, not by batch."""
        assert self._codec is not None
        noise = None
        if self._codec.needs_noise:
            draws = [
                keyed_generator(self._recipe.seed, Stream.POSTERIOR, entry.position, int(mirrored)).standard_normal(
                    shape, np.float32
                )
                for entry in entries
            ]
            noise = torch.from_numpy(np.stack(draws))
        return self._codec.encode(images, noise).to(torch.float16)

    def _on_device(self, compute: Callable[..., Any], *inputs: Any) -> Any:
        try:
            return compute(*inputs)
        except torch.OutOfMemoryError as error:
            raise PomscaleError(
                f"the device has no room for a batch of {self._recipe.batch}: {error}. "
                f"Lower `batch` and run the same command again; finished parts are kept"
            ) from error

    # -- write -----------------------------------------------------------------------------------------------------

    def _hand_over(self, launched: _Launched | None) -> None:
        if launched is not None:
            arrays = {name: tensor.cpu().numpy() for name, tensor in launched.arrays.items()}
            self._write(lambda: self._store(launched, arrays))

    def _store(self, batch: _Launched, latents: dict[ArrayName, np.ndarray]) -> None:
        writer = batch.work.writers[batch.variant]
        counts = batch.variant == batch.work.first_variant
        for i, entry in enumerate(batch.entries):
            arrays = {name: values[i] for name, values in latents.items()}
            packed: dict[ArrayName, bytes] = {}
            if batch.media:
                arrays["latent"], packed = batch.media[i].values.transpose(2, 0, 1), batch.media[i].packed
            arrays |= entry.texts
            broken = [name for name, array in arrays.items() if not is_finite(array)]
            if broken:
                verb = "have" if broken[0].startswith("features") else "has"
                reason = f"its {broken[0]} {verb} {why_not_finite(arrays[broken[0]])}"
                writer.fail(entry.position, entry.item, reason)
                if entry.failure is None:  # else it failed in another size, and is counted
                    entry.failure = reason
                    self._display.fail(was_encoded=not counts)
                continue
            captions = entry.item.captions
            info = {"source": entry.item.where, **entry.info}
            if len(captions) > 1:
                info[CAPTIONS_FIELD] = captions
            caption = _texts(entry.item, self._recipe.captions)[0] if captions else None
            record = Record(entry.item.key, arrays, entry.item.label, caption, info, packed)
            self._display.advance(writer.add(batch.group, record), num_items=int(counts))

    def _give_up(self, work: PartWork, entry: Loaded, reason: str) -> None:
        work.has_gone |= entry.is_gone

        def write() -> None:
            for writer in work.writers.values():
                writer.fail(entry.position, entry.item, reason)
            self._display.fail()

        self._write(write)

    def _finish(self, work: PartWork, done: Callable[[int], None]) -> None:
        """Encode the rest of a part, then commit it."""
        if work.has_gone:
            # One file was removed, which is a failure; or the whole storage was unmounted, which is an error.
            check_items_in_place(self._recipe, self._setup.source, self._setup.table)
        self._embed(work)
        for variant, group in sorted(work.batches):
            self._encode(work, variant, group)
        launched, self._launched = self._launched, None
        self._hand_over(launched)

        def commit() -> None:
            for writer in work.writers.values():
                writer.commit()
            self._open.remove(work)
            done(work.part)

        self._write(commit)

    def _write(self, task: Callable[[], None]) -> None:
        """Queue a task for the writing thread, which runs them in order; its errors are raised here.

        After the first error, or a stop, none of the waiting tasks runs: the commit of a part must never follow a
        record of it that was lost.
        """

        def guarded() -> None:
            if self._broken:
                return
            try:
                task()
            except BaseException:
                self._broken = True
                raise

        self._writes.append(self._writer.submit(guarded))
        while self._writes and (len(self._writes) > _MAX_WAITING_WRITES or self._writes[0].done()):
            start = time.monotonic()
            self._writes.popleft().result()
            self._display.waited(time.monotonic() - start)


def _texts(item: Item, captions: Literal["random", "first", "join"]) -> list[str]:
    """Return the texts of an item that are embedded, as the recipe's `captions` says; the first is its caption."""
    if captions == "join":
        return [" ".join(item.captions)]
    return item.captions[:1] if captions == "first" else item.captions
