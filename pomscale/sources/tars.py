"""WebDataset tars of pictures or clips, as img2dataset and `webdataset.ShardWriter` write them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from pomscale.base.errors import InputError
from pomscale.config.encode import TarSourceConfig
from pomscale.media import CLIP_EXTENSIONS, PICTURE_EXTENSIONS
from pomscale.sources import storage
from pomscale.sources.item_fields import (
    ClassIds,
    checked_caption,
    checked_key,
    decode_text,
    parse_object,
    readable,
)
from pomscale.sources.protocol import Item
from pomscale.sources.row_filter import RowFilter
from pomscale.sources.tar_scan import DamagedTarError, Sample, TarScan

_FIELDS_SUFFIX = ".json"
_MEDIA_SUFFIXES = {*PICTURE_EXTENSIONS, *CLIP_EXTENSIONS}
_NEIGHBOURS = (
    "if it is elsewhere in the tar, write the tar with `tar --sort=name`: the members of a sample must be neighbours"
)


class TarSource:
    """Tars sorted by path, then their samples in order.

    A key is TAR/KEY, with TAR the tar's path without .tar, relative to the folder that holds them all, because writers
    count from 0 in every tar. Items are not shuffled, so a task reads each tar from one end to the other.
    """

    shuffled = False
    cuts_files = False

    def __init__(self, config: TarSourceConfig) -> None:
        self._files = storage.NamedFiles(config.path, "*.tar")
        self._media = None if config.media is None else _suffix("source.media", config.media)
        self._label = None if config.label is None else _Annotation("class", "source.label", config.label)
        self._caption = None if config.caption is None else _Annotation("caption", "source.caption", config.caption)
        self._caption_lines = config.caption_lines
        self._classes = ClassIds(config.class_names)
        self._filter = RowFilter(config.where)
        self._num_ignored = self._num_filtered = 0
        self._reader = storage.RangeReader()

    @property
    def class_names(self) -> tuple[str, ...]:
        return () if self._label is None else self._classes.names

    @property
    def num_ignored(self) -> int:
        """Number of members that belong to no sample."""
        return self._num_ignored

    @property
    def num_filtered(self) -> int:
        """Number of samples that `where` left out."""
        return self._num_filtered

    def check_exists(self) -> None:
        self._files.find()

    def scan(self) -> Iterator[Item]:
        """Yield an item per sample; a damaged tar yields an item with a problem as well.

        Raises InputError if a tar is missing or compressed.
        """
        self._num_ignored = self._num_filtered = 0
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
        if (method := storage.compression(stream.read(storage.MAGIC_BYTES))) is not None:
            raise InputError(
                f"source.path: {path} is compressed ({method}), so samples cannot be found in it; decompress it first"
            )
        num_bytes = storage.size_of(stream)
        prefix = name.removesuffix(".tar")
        wanted = {annotation.suffix for annotation in (self._label, self._caption) if annotation is not None}
        if self._filter.columns:
            wanted.add(_FIELDS_SUFFIX)
        samples, num_samples = TarScan(stream, wanted), 0
        try:
            for sample in samples:
                num_samples += 1
                is_taken, problem = self._judge(sample)
                if is_taken:
                    yield self._item(sample, name, prefix, num_bytes, problem)
                else:
                    self._num_filtered += 1
        except DamagedTarError as error:
            problem = f"the tar is damaged: {readable(str(error))}; its {num_samples:,} samples before that are read"
            yield Item(checked_key(prefix)[0], readable(name), problem=problem)
        self._num_ignored += samples.num_ignored

    def _judge(self, sample: Sample) -> tuple[bool, str | None]:
        """Return whether a sample is taken, and why that cannot be told, or None."""
        if not self._filter.columns:
            return True, None
        fields, problem = _fields_of(sample, "fields of source.where are")
        return (True, problem) if fields is None else self._filter.judge(fields)

    def _item(self, sample: Sample, name: str, prefix: str, num_bytes: int, problem: str | None) -> Item:
        key, unusable = checked_key(f"{prefix}/{sample.key}")
        problem = problem or unusable
        where, location, label, caption = f"{name}/{sample.key}", None, None, None
        media, unusable = self._find_media(sample)
        problem = problem or unusable
        if media is not None:
            member = sample.members[media]
            where += member.suffix
            location = None if unusable else [name, member.offset, member.size, num_bytes]
        if self._label is not None:
            value, missing = self._label.find(sample)
            label, unusable = self._classes.checked(value)
            problem = problem or missing or unusable
        if self._caption is not None:
            value, missing = self._caption.find(sample)
            caption, unusable = checked_caption(value, self._caption_lines)
            problem = problem or missing or unusable
        return Item(key, readable(where), location, label, caption, problem)

    def _find_media(self, sample: Sample) -> tuple[str | None, str | None]:
        """Return the suffix of the picture or clip, and why it cannot be used, or None."""
        if self._media is not None:
            found = [self._media] if self._media in sample.members else []
        else:
            found = [suffix for suffix in sample.members if f".{suffix.rpartition('.')[2]}" in _MEDIA_SUFFIXES]
        if len(found) > 1:
            return None, (
                f"it has several pictures or clips ({_names(found)}); "
                f"say which one with source.media, e.g. source.media={found[0][1:]}"
            )
        if not found:
            wanted = "a picture or a clip" if self._media is None else f"called {self._media[1:]}"
            return None, f"none of its members ({_names(sample.members)}) is {wanted}; {_NEIGHBOURS}"
        return found[0], _fault_of(sample, found[0])


class _Annotation:
    """The member of a sample that has the class or caption: by its extension (cls, txt), or json:FIELD."""

    def __init__(self, what: str, name: str, rule: str) -> None:
        extension, _, self._field = rule.partition(":")
        if not extension or (extension.lower() == "json") != bool(self._field):
            raise InputError(f"{name}: {rule!r} is neither a member's extension, such as txt, nor json:FIELD")
        self.suffix = _suffix(name, extension)
        self._what = what

    def find(self, sample: Sample) -> tuple[Any, str | None]:
        """Return the value, None if there is none, and what is wrong with the member, or None."""
        what = f"{self._what} is"
        if not self._field:
            content, problem = _content_of(sample, self.suffix, what)
            return None if content is None else decode_text(content).strip(), problem
        fields, problem = _fields_of(sample, what)
        return None if fields is None else fields.get(self._field), problem


def _content_of(sample: Sample, suffix: str, what: str) -> tuple[bytes | None, str | None]:
    """Return the bytes of a member that was asked for, and why there are none, or None."""
    if suffix not in sample.members:
        return None, f"its {what} missing: it has no {suffix[1:]} member; {_NEIGHBOURS}"
    fault = _fault_of(sample, suffix)
    return (None, fault) if fault is not None else (sample.contents[suffix], None)


def _fields_of(sample: Sample, what: str) -> tuple[dict[str, Any] | None, str | None]:
    """Return the fields of the json member, and why there are none, or None."""
    content, problem = _content_of(sample, _FIELDS_SUFFIX, what)
    if content is None:
        return None, problem
    fields = parse_object(content)
    return (None, f"its json member {fields}") if isinstance(fields, str) else (fields, None)


def _suffix(name: str, extension: str) -> str:
    """Return the suffix of members with an extension that a recipe names; InputError if it can be that of none."""
    if not extension or extension[0] == "." or "/" in extension:
        raise InputError(f"{name}: {extension!r} is no member's extension, such as jpg or rgb.png")
    return f".{extension.lower()}"


def _fault_of(sample: Sample, suffix: str) -> str | None:
    fault = sample.members[suffix].fault
    return None if fault is None else f"its {readable(suffix[1:])} member {fault}"


def _names(suffixes: Iterable[str]) -> str:
    return readable(", ".join(suffix[1:] for suffix in suffixes))
