"""Raw pictures -> latent shards.

Items are dealt to fixed parts in a shuffled order; a part becomes one shard and is a pure function of (source
fingerprint, part number, recipe). So an encode that was killed goes on where it stopped, and ends with the same bytes
as one that was not (with a VAE: on the same device, with the same batch).
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

import numpy as np
import torch

from data_pipelines.common.parts import Failure, PartRecord, PartStore, Plan
from data_pipelines.common.progress import EncodeProgress
from data_pipelines.common.shards import Record, ShardWriter
from data_pipelines.common.statistics import ChannelStatistics
from data_pipelines.images.source import ImageFolder, Item, scan_image_folder
from data_pipelines.images.transform import Picture, UnreadablePictureError, load_picture, to_images
from pomscale import __version__
from pomscale.codecs import Codec, build_codec
from pomscale.config.schema import EncodeRecipe
from pomscale.data.index import INDEX_DTYPE, npy_header
from pomscale.data.schema import (
    FAILURES_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    CodecInfo,
    IndexInfo,
    LatentInfo,
    Manifest,
    ShardInfo,
)
from pomscale.distributed.world import resolve_device
from pomscale.errors import PomscaleError
from pomscale.files import atomic_write, write_text
from pomscale.keyed_random import Stream, keyed_generator

# Subindex of Stream.DATASET; `show` uses 2.
_ITEM_ORDER = 1


@dataclass(frozen=True)
class EncodeReport:
    """What an encode did. `num_resumed_parts` were finished by an earlier run."""

    output: Path
    num_samples: int
    num_failures: int
    num_shards: int
    num_bytes: int
    num_parts: int
    num_resumed_parts: int

    @property
    def exit_code(self) -> int:
        return 3 if self.num_failures else 0

    def __str__(self) -> str:
        text = (
            f"{self.output}: {self.num_samples:,} samples in {self.num_shards:,} shards, {self.num_bytes / 1e9:.3f} GB"
        )
        if self.num_resumed_parts:
            text += f"; {self.num_resumed_parts:,} of {self.num_parts:,} parts were already there"
        if self.num_failures:
            text += f"; {self.num_failures:,} items failed, listed in {self.output / FAILURES_NAME}"
        return text


def encode(recipe: EncodeRecipe, *, progress: bool = True) -> EncodeReport:
    """Encodes what is missing in `recipe.output`, then writes index and manifest.

    Items that cannot be encoded are listed in failures.jsonl and the rest goes on. InputError for a wrong source or
    an output that another encode has or had; PomscaleError if nothing could be encoded, the disk is full or a
    picture cannot be read.
    """
    job = _Job(recipe)
    num_resumed = 0
    with job.store.claim(job.plan):
        with (
            EncodeProgress(len(job.source.items), enabled=progress) as display,
            ThreadPoolExecutor(recipe.num_workers, "decode") as pool,
        ):
            for part in range(job.num_parts):
                if job.store.read(part) is None:
                    _encode_part(job, part, pool, display)
                else:
                    num_resumed += 1
                    display.skip(len(job.part_numbers(part)))
        manifest = _finish(job)
    return EncodeReport(
        output=job.store.output,
        num_samples=manifest.num_samples,
        num_failures=manifest.num_failures,
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        num_parts=job.num_parts,
        num_resumed_parts=num_resumed,
    )


def describe(recipe: EncodeRecipe) -> str:
    """What `encode` would write (the dry run). Writes nothing; same errors for a wrong source or codec."""
    job = _Job(recipe)
    source, shape = job.source, job.stored_shape
    latent = np.zeros(shape, np.float16)
    stream = io.BytesIO()
    example = source.items[0]
    info = {"source": example.path, "width": 1000, "height": 1000}
    flip = latent if recipe.transform.flip else None
    ShardWriter(stream).add(Record(example.key, latent, flip, example.label, info))
    bytes_per_item = stream.tell()
    return "\n".join(
        [
            f"source   {source.root}: {len(source.items):,} pictures in {len(source.class_names):,} classes"
            + (f", {source.num_ignored:,} other files ignored" if source.num_ignored else ""),
            f"codec    {job.codec.name}, {'moments' if job.codec.stores_moments else 'samples'} "
            f"of shape {shape}, float16{', with flipped copies' if recipe.transform.flip else ''}",
            f"output   {recipe.output}: {job.num_parts:,} shards, about {bytes_per_item:,} bytes per picture, "
            f"{bytes_per_item * len(source.items) / 1e9:.3f} GB in all",
        ]
    )


class _Job:
    """A recipe with everything it names: source, codec on its device, plan, and the dealing of items to parts."""

    def __init__(self, recipe: EncodeRecipe) -> None:
        self.recipe = recipe
        self.source: ImageFolder = scan_image_folder(Path(recipe.source.path))
        self.codec: Codec = build_codec(recipe.codec).to(resolve_device(recipe.device))
        self.latent_shape = self.codec.latent_shape(recipe.transform.size, recipe.transform.size)
        self.plan = Plan(
            source_fingerprint=self.source.fingerprint,
            num_items=len(self.source.items),
            shard_samples=recipe.shard_samples,
            seed=recipe.seed,
            codec=recipe.codec.model_dump(exclude={"path"}),
            codec_identity=self.codec.identity(),
            transform=recipe.transform,
        )
        self.store = PartStore(Path(recipe.output))
        self.num_parts = -(-len(self.source.items) // recipe.shard_samples)
        # Sources are sorted by class. Shuffled once here, every shard holds a fair draw of the classes, and so does
        # the loader's shuffle window, which spans only a few shards.
        order = keyed_generator(recipe.seed, Stream.DATASET, 0, _ITEM_ORDER)
        self._order = order.permutation(len(self.source.items))

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.latent_shape
        return (2 * channels if self.codec.stores_moments else channels), height, width

    def part_numbers(self, part: int) -> range:
        """Places, in the shuffled order, of the items of a part."""
        size = self.recipe.shard_samples
        return range(part * size, min((part + 1) * size, len(self.source.items)))

    def item(self, number: int) -> Item:
        return self.source.items[self._order[number]]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An item with its picture, or with the reason why there is none."""

    number: int  # place in the shuffled order
    item: Item
    picture: Picture | str


def _encode_part(job: _Job, part: int, pool: ThreadPoolExecutor, display: EncodeProgress) -> None:
    failures: list[Failure] = []
    records = _records(job, part, pool, failures, display)
    first = next(records, None)
    shard, statistics, rows = None, None, np.empty(0, INDEX_DTYPE)
    if first is not None:
        path = job.store.shard_path(part)
        with atomic_write(path) as stream:
            writer = ShardWriter(stream)
            for record in itertools.chain([first], records):
                begin = stream.tell()
                writer.add(record)
                mine = _statistics(record, job.codec.stores_moments)
                statistics = mine if statistics is None else statistics.merge(mine)
                display.advance(stream.tell() - begin)
            rows = writer.finish()
            num_bytes, sha256 = _num_bytes_and_sha256(stream)
        shard = ShardInfo(name=path.name, num_samples=len(rows), num_bytes=num_bytes, sha256=sha256)
    job.store.commit(part, PartRecord(shard=shard, statistics=statistics, failures=tuple(failures)), rows)


def _num_bytes_and_sha256(stream: BufferedRandom) -> tuple[int, str]:
    """Of all that was written to the stream so far."""
    num_bytes = stream.tell()
    stream.seek(0)
    return num_bytes, hashlib.file_digest(stream, "sha256").hexdigest()


def _statistics(record: Record, stores_moments: bool) -> ChannelStatistics:
    latents = record.latent[None] if record.flip is None else np.stack([record.latent, record.flip])
    return ChannelStatistics.of(latents, stores_moments)


def _records(
    job: _Job, part: int, pool: ThreadPoolExecutor, failures: list[Failure], display: EncodeProgress
) -> Iterator[Record]:
    """The records of a part in order; what cannot be encoded is appended to `failures` instead."""

    def give_up(item: Item, reason: str) -> None:
        failures.append(Failure(key=item.key, path=item.path, reason=reason))
        display.fail()

    def encoded(batch: list[_Loaded]) -> Iterator[Record]:
        for entry, record in zip(batch, _encode_batch(job, batch), strict=True):
            if record is None:
                give_up(entry.item, "its latent is not finite in float16")
            else:
                yield record

    batch: list[_Loaded] = []
    for entry in _load_ahead(job, part, pool):
        if isinstance(entry.picture, str):
            give_up(entry.item, entry.picture)
        else:
            batch.append(entry)
        if len(batch) == job.recipe.batch:
            yield from encoded(batch)
            batch = []
    if batch:
        yield from encoded(batch)


def _load_ahead(job: _Job, part: int, pool: ThreadPoolExecutor) -> Iterator[_Loaded]:
    """The items of a part in order, with the decoding threads at most two batches ahead."""
    pending: deque[Future[_Loaded]] = deque()
    for number in job.part_numbers(part):
        pending.append(pool.submit(_load, job, number))
        if len(pending) > 2 * job.recipe.batch:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _load(job: _Job, number: int) -> _Loaded:
    item = job.item(number)
    try:
        picture = load_picture(job.source.root / item.path, job.recipe.transform, job.codec.num_channels_in)
    except UnreadablePictureError as error:
        return _Loaded(number, item, str(error))
    return _Loaded(number, item, picture)


def _encode_batch(job: _Job, batch: list[_Loaded]) -> list[Record | None]:
    """One record per entry; None where a latent is not finite after rounding to float16."""
    pictures = [entry.picture for entry in batch if isinstance(entry.picture, Picture)]
    images = to_images(pictures)
    numbers = [entry.number for entry in batch]
    latents = _to_stored(job, images, numbers, mirrored=False)
    flips = _to_stored(job, images.flip(-1), numbers, mirrored=True) if job.recipe.transform.flip else None
    records: list[Record | None] = []
    for i, (entry, picture) in enumerate(zip(batch, pictures, strict=True)):
        flip = None if flips is None else flips[i]
        finite = np.isfinite(latents[i]).all() and (flip is None or np.isfinite(flip).all())
        info = {"source": entry.item.path, "width": picture.width, "height": picture.height}
        records.append(Record(entry.item.key, latents[i], flip, entry.item.label, info) if finite else None)
    return records


def _to_stored(job: _Job, images: torch.Tensor, numbers: list[int], *, mirrored: bool) -> np.ndarray:
    """Float16 latents as they are stored. Posterior draws are keyed by item, so a batch's make-up does not matter."""
    noise = None
    if job.codec.needs_noise:
        draws = [
            keyed_generator(job.recipe.seed, Stream.POSTERIOR, number, int(mirrored)).standard_normal(
                job.latent_shape, np.float32
            )
            for number in numbers
        ]
        noise = torch.from_numpy(np.stack(draws))
    return job.codec.encode(images, noise).to(torch.float16).cpu().numpy()


def _finish(job: _Job) -> Manifest:
    """Puts the parts together: failures, index, and last the manifest, which declares the dataset complete."""
    parts = [(part, record) for part in range(job.num_parts) if (record := job.store.read(part)) is not None]
    if len(parts) != job.num_parts:
        raise PomscaleError(f"{job.store.output}: a part vanished while others were made; run the same command again")
    failures = [failure for _, record in parts for failure in record.failures]
    whole = [(part, record.shard, record.statistics) for part, record in parts if record.shard and record.statistics]
    output = job.store.output
    if failures:
        with atomic_write(output / FAILURES_NAME) as stream:
            stream.writelines(f"{failure.model_dump_json()}\n".encode() for failure in failures)
    else:
        (output / FAILURES_NAME).unlink(missing_ok=True)
    if not whole:
        raise PomscaleError(
            f"none of the {len(failures):,} items could be encoded; the reasons are in {output / FAILURES_NAME}, "
            f"the first is: {failures[0].path}: {failures[0].reason}"
        )
    shards = [shard for _, shard, _ in whole]
    statistics = whole[0][2]
    for _, _, more in whole[1:]:
        statistics = statistics.merge(more)
    index = _write_index(job, [(part, shard.num_samples) for part, shard, _ in whole])
    manifest = Manifest(
        pomscale_version=__version__,
        modality="image",
        codec=CodecInfo(
            config=job.recipe.codec,
            identity=job.plan.codec_identity,
            scaling_factor=job.codec.scaling_factor,
            shift=job.codec.shift,
        ),
        latent=LatentInfo(
            shape=job.latent_shape,
            dtype="float16",
            stores_moments=job.codec.stores_moments,
            mean=statistics.mean,
            std=statistics.std,
        ),
        transform=job.recipe.transform,
        class_names=job.source.class_names,
        num_samples=sum(shard.num_samples for shard in shards),
        num_failures=len(failures),
        source_fingerprint=job.source.fingerprint,
        shards=tuple(shards),
        index=index,
        recipe=job.recipe.model_dump(mode="json"),
    )
    write_text(output / MANIFEST_NAME, manifest.model_dump_json(indent=2))
    return manifest


def _write_index(job: _Job, parts: list[tuple[int, int]]) -> IndexInfo:
    """One .npy of parts and their numbers of samples, written part by part: only one part's rows are in memory."""
    num_samples = sum(num_rows for _, num_rows in parts)
    with atomic_write(job.store.output / INDEX_NAME) as stream:
        stream.write(npy_header((num_samples,), INDEX_DTYPE))
        for shard, (part, num_rows) in enumerate(parts):
            rows = job.store.read_rows(part, num_rows)
            rows["shard"] = shard
            stream.write(rows.tobytes())
        num_bytes, sha256 = _num_bytes_and_sha256(stream)
    return IndexInfo(num_bytes=num_bytes, sha256=sha256)
