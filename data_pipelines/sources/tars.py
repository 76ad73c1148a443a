"""WebDataset tars of pictures or clips, as img2dataset and `webdataset.ShardWriter` write them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from data_pipelines.sources import storage
from data_pipelines.sources.item_fields import ClassIds, checked_caption, checked_key, decode_text, readable
from data_pipelines.sources.protocol import Item
from pomscale.base.errors import InputError
from pomscale.config.encode import TarSourceConfig
from pomscale.media import CLIP_EXTENSIONS, PICTURE_EXTENSIONS
from pomscale.shards.index import split_member_name

_MEDIA_SUFFIXES = {*PICTURE_EXTENSIONS, *CLIP_EXTENSIONS}
_GZIP_MAGIC = b"\x1f\x8b"


class TarSource:
    """Tars sorted by path, then their samples in order.

    A key is TAR/KEY, with TAR the tar's path without .tar, relative to the folder that holds them all, because writers
    count from 0 in every tar. Items are not shuffled, so a task reads each tar from one end to the other.
    """

    shuffled = False

    def __init__(self, config: TarSourceConfig) -> None:
        self._files = storage.NamedFiles(config.path, "*.tar")
        self._label = None if config.label is None else _Annotation("source.label", config.label)
        self._caption = None if config.caption is None else _Annotation("source.caption", config.caption)
        self._caption_lines = config.caption_lines
        self._classes = ClassIds(config.class_names)
        self._num_ignored = 0
        self._reader = storage.RangeReader()

    @property
    def class_names(self) -> tuple[str, ...]:
        return () if self._label is None else self._classes.names

    @property
    def num_ignored(self) -> int:
        """Number of members that belong to no sample."""
        return self._num_ignored

    def scan(self) -> Iterator[Item]:
        """Yield an item per sample; a damaged tar yields an item with a problem as well.

        Raises InputError if a tar is missing or compressed.
        """
        self._num_ignored = 0
        self._classes.begin()
        for path, name in self._files.find():
            with storage.open_stream(path) as stream:
                yield from self._scan_tar(stream, path, name)

    def fingerprint_line(self, item: Item) -> str:
        """Return key, location in the tar, class and caption."""
        location = None if item.location is None else item.location[1:]
        return json.dumps([item.key, location, item.label, item.caption])

    def open(self, item: Item) -> BinaryIO:
        name, *location = item.location
        return io.BytesIO(self._reader.read(self._files.path(name), *location))

    def _scan_tar(self, stream: BinaryIO, path: str, name: str) -> Iterator[Item]:
        if stream.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC:
            raise InputError(f"source.path: {path} is compressed, so samples cannot be found in it; gunzip it first")
        num_bytes = storage.size_of(stream)
        prefix = name.removesuffix(".tar")
        wanted = {annotation.suffix for annotation in (self._label, self._caption) if annotation is not None}
        samples, num_samples = TarScan(stream, wanted), 0
        try:
            for sample in samples:
                num_samples += 1
                yield self._item(sample, name, prefix, num_bytes)
        except DamagedTarError as error:
            problem = f"the tar is damaged: {readable(str(error))}; its {num_samples:,} samples before that are read"
            yield Item(checked_key(prefix)[0], readable(name), problem=problem)
        self._num_ignored += samples.num_ignored

    def _item(self, sample: Sample, name: str, prefix: str, num_bytes: int) -> Item:
        key, problem = checked_key(f"{prefix}/{sample.key}")
        where, location, label, caption = f"{name}/{sample.key}", None, None, None
        media = next((suffix for suffix in sample.members if suffix.lower() in _MEDIA_SUFFIXES), None)
        if media is None:
            present = ", ".join(suffix[1:] for suffix in sample.members)
            problem = problem or f"none of its members ({readable(present)}) is a picture or a clip"
        else:
            where += media
            location = [name, *sample.members[media], num_bytes]
        if self._label is not None:
            value, missing = self._label.find(sample)
            label, unusable = self._classes.checked(value)
            problem = problem or missing or unusable
        if self._caption is not None:
            value, missing = self._caption.find(sample)
            caption, unusable = checked_caption(value, self._caption_lines)
            problem = problem or missing or unusable
        return Item(key, readable(where), location, label, caption, problem)


class _Annotation:
    """The member of a sample that has the class or caption: by its extension (cls, txt), or json:FIELD."""

    def __init__(self, name: str, rule: str) -> None:
        extension, _, self._field = rule.partition(":")
        if not extension or (extension == "json") != bool(self._field):
            raise InputError(f"{name}: {rule!r} is neither a member's extension, such as txt, nor json:FIELD")
        self.suffix = f".{extension}"

    def find(self, sample: Sample) -> tuple[Any, str | None]:
        """Return the value, None if there is none, and what is wrong with the member, or None."""
        content = sample.contents.get(self.suffix)
        if content is None or not self._field:
            return None if content is None else decode_text(content).strip(), None
        try:
            fields = json.loads(content)
        except ValueError:
            return None, "its json member is no JSON"
        return (fields.get(self._field), None) if isinstance(fields, dict) else (None, "its json member has no fields")


# -- samples of a tar --------------------------------------------------------------------------------------------------


class DamagedTarError(Exception):
    """A tar cannot be read beyond some byte."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Consecutive members of one key, by suffix."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and size in bytes."""
    contents: dict[str, bytes] = field(default_factory=dict)
    """Bytes of the members that were asked for."""


class TarScan:
    """Iterates over the samples of a tar, in order, by its headers; of the contents only what is asked for is read.

    Where the tar is cut off or a header is damaged, it raises DamagedTarError after the last sample that is whole.
    """

    def __init__(self, stream: BinaryIO, wanted: Collection[str]) -> None:
        """Prepare a scan that reads the members with the suffixes `wanted` (with their dot)."""
        self.num_ignored = 0  # members that are no part of a sample
        self._stream = stream
        self._num_bytes = storage.size_of(stream)
        self._wanted = wanted

    def __iter__(self) -> Iterator[Sample]:
        sample = Sample("")
        try:
            for key, suffix, offset, size in self._members():
                # A second member of the same name begins another sample, whose key is then a duplicate.
                if key != sample.key or suffix in sample.members:
                    if sample.members:
                        yield sample
                    sample = Sample(key)
                sample.members[suffix] = offset, size
                if suffix in self._wanted:
                    self._stream.seek(offset)
                    sample.contents[suffix] = self._stream.read(size)
        except DamagedTarError:
            if sample.members:
                yield sample
            raise
        if sample.members:
            yield sample

    def _members(self) -> Iterator[tuple[str, str, int, int]]:
        """Yield key, suffix, offset and size of plain files that WebDataset would read."""
        try:
            with tarfile.open(fileobj=self._stream, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                    if member.offset_data + member.size > self._num_bytes:
                        raise DamagedTarError(f"{member.name} is cut off")
                    key, suffix = split_member_name(member.name.removeprefix("./"))
                    if member.isfile() and suffix and key and not key.endswith("/"):
                        yield key, suffix, member.offset_data, member.size
                    elif not member.isdir():
                        self.num_ignored += 1
                self._check_end(tar.offset)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise DamagedTarError(str(error)) from error

    def _check_end(self, offset: int) -> None:
        """Raise DamagedTarError unless the tar ends with zeros at `offset`.

        tarfile takes a damaged or missing header for the end.
        """
        self._stream.seek(offset)
        block = self._stream.read(tarfile.BLOCKSIZE)
        if not block:
            raise DamagedTarError("it has no end mark, so it may be cut off")
        if block.strip(b"\0") or len(block) < tarfile.BLOCKSIZE:
            raise DamagedTarError(f"the header at byte {offset:,} is damaged")
