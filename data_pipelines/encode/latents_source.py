"""Captions of a dataset that is already encoded: the source of a companion set of text embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from data_pipelines.shards.readers import TarReader
from pomscale.base.errors import InputError
from pomscale.config.encode import LatentsSourceConfig, SourceConfig
from pomscale.shards.location import join
from pomscale.shards.schema import CAPTION_MEMBER, REMEDY, Manifest, read_manifest
from pomscale.sources import build_source, storage
from pomscale.sources.item_fields import checked_caption
from pomscale.sources.protocol import Item, Source


class LatentsSource:
    """The records of a dataset in the order of its index, with their keys."""

    shuffled = False
    cuts_files = False
    class_names = ()
    num_ignored = num_filtered = 0

    def __init__(self, config: LatentsSourceConfig) -> None:
        self._path = config.path

    def check_exists(self) -> None:
        self._read_manifest()

    def scan(self) -> Iterator[Item]:
        """Yield the captions of each record; a damaged shard yields an item with a problem as well.

        Raises InputError if the folder is no dataset or has no captions.
        """
        for shard in self._read_manifest().shards:
            with storage.open_stream(join(self._path, shard.name)) as stream:
                yield from _scan_shard(stream, shard.name)

    def fingerprint_line(self, item: Item) -> str:
        """Return key and caption."""
        return json.dumps([item.key, item.caption])

    def open(self, item: Item) -> BinaryIO:
        raise InputError("source: a dataset of latents is a source of captions only; leave out codec and transform")

    def _read_manifest(self) -> Manifest:
        manifest = read_manifest(self._path)
        if not manifest.has_captions:
            raise InputError(f"source.path: the records of {self._path} have no captions; encode it with captions")
        return manifest


def _scan_shard(stream: BinaryIO, name: str) -> Iterator[Item]:
    reader = TarReader(stream)
    for record in reader:
        try:
            caption, problem = checked_caption(record.captions() or None)
        except ValueError as error:
            caption, problem = None, f"its captions cannot be read: {error}"
        yield Item(record.key, f"{name}/{record.key}{CAPTION_MEMBER}", caption=caption, problem=problem)
    if reader.damages:
        yield Item(name.removesuffix(".tar"), name, problem=f"the shard is damaged: {reader.damages[0]}; {REMEDY}")


def build_encode_source(config: SourceConfig) -> Source:
    """Return the source that an encode recipe names. Nothing is read before `scan`."""
    return LatentsSource(config) if isinstance(config, LatentsSourceConfig) else build_source(config)
