"""WebDataset tars of pictures or clips, as img2dataset and `webdataset.ShardWriter` write them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from data_pipelines.sources import fs
from data_pipelines.sources.annotations import ClassIds, checked_caption, decode_text
from data_pipelines.sources.keys import checked_key, readable
from data_pipelines.sources.media import CLIP_EXTENSIONS, PICTURE_EXTENSIONS
from data_pipelines.sources.source import Item
from data_pipelines.sources.tar_scan import DamagedTarError, Sample, TarScan
from pomscale.base.errors import InputError
from pomscale.config.encode import TarSourceConfig

_MEDIA_SUFFIXES = PICTURE_EXTENSIONS | CLIP_EXTENSIONS
_GZIP_MAGIC = b"\x1f\x8b"


class TarSource:
    """Tars sorted by path, then their samples in order.

    A key is TAR/KEY, with TAR the tar's path without .tar, relative to the folder that holds them all: writers begin
    to count anew in every tar. Items are not shuffled, so a task reads each tar from one end to the other.
    """

    shuffled = False

    def __init__(self, config: TarSourceConfig) -> None:
        self._files = fs.NamedFiles(config.path, "*.tar")
        self._label = None if config.label is None else _Annotation("source.label", config.label)
        self._caption = None if config.caption is None else _Annotation("source.caption", config.caption)
        self._classes = ClassIds(config.class_names)
        self._num_ignored = 0
        self._reader = fs.RangeReader()

    @property
    def class_names(self) -> tuple[str, ...]:
        return () if self._label is None else self._classes.names

    @property
    def num_ignored(self) -> int:
        """Members of the tars that belong to no sample."""
        return self._num_ignored

    def scan(self) -> Iterator[Item]:
        """InputError if a tar is missing or compressed. One that is damaged is an item with a problem."""
        self._num_ignored = 0
        self._classes.begin()
        for path, name in self._files.find():
            with fs.open_stream(path) as stream:
                yield from self._scan_tar(stream, path, name)

    def fingerprint_line(self, item: Item) -> str:
        """Key, place in the tar, class and caption."""
        place = None if item.place is None else item.place[1:]
        return json.dumps([item.key, place, item.label, item.caption])

    def open(self, item: Item) -> BinaryIO:
        name, *place = item.place
        return io.BytesIO(self._reader.read(self._files.path(name), *place))

    def _scan_tar(self, stream: BinaryIO, path: str, name: str) -> Iterator[Item]:
        if stream.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC:
            raise InputError(f"source.path: {path} is compressed, so samples cannot be found in it; gunzip it first")
        num_bytes = fs.size_of(stream)
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
        where, place, label, caption = f"{name}/{sample.key}", None, None, None
        media = next((suffix for suffix in sample.places if suffix.lower() in _MEDIA_SUFFIXES), None)
        if media is None:
            there = ", ".join(suffix[1:] for suffix in sample.places)
            problem = problem or f"none of its members ({readable(there)}) is a picture or a clip"
        else:
            where += media
            place = [name, *sample.places[media], num_bytes]
        if self._label is not None:
            value, missing = self._label.find(sample)
            label, unusable = self._classes.checked(value)
            problem = problem or missing or unusable
        if self._caption is not None:
            value, missing = self._caption.find(sample)
            caption, unusable = checked_caption(value)
            problem = problem or missing or unusable
        return Item(key, readable(where), place, label, caption, problem)


class _Annotation:
    """Where in a sample a class or caption is: a member by its extension (cls, txt), or json:FIELD."""

    def __init__(self, name: str, rule: str) -> None:
        extension, _, self._field = rule.partition(":")
        if not extension or (extension == "json") != bool(self._field):
            raise InputError(f"{name}: {rule!r} is neither a member's extension, such as txt, nor json:FIELD")
        self.suffix = f".{extension}"

    def find(self, sample: Sample) -> tuple[Any, str | None]:
        """The value, None if there is none; and what is wrong with the member, or None."""
        content = sample.contents.get(self.suffix)
        if content is None or not self._field:
            return None if content is None else decode_text(content).strip(), None
        try:
            fields = json.loads(content)
        except ValueError:
            return None, "its json member is no JSON"
        return (fields.get(self._field), None) if isinstance(fields, dict) else (None, "its json member has no fields")
