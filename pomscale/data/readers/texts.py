"""Text embeddings of a dataset's records: from its own shards, or from a companion set joined by key."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pomscale.base.keyed_random import Stream
from pomscale.data.draws import uniforms_at
from pomscale.data.readers.arrays import ArrayReader, Faults, Members
from pomscale.data.readers.companion import CompanionReader
from pomscale.shards.schema import TextInfo, text_info


def null_embedding(info: TextInfo) -> Tensor:
    """Return the embedding of the empty caption, (null_length, dim) float16."""
    null = np.frombuffer(info.null_bytes, "<f2").reshape(info.null_length, info.dim)
    return torch.from_numpy(null.astype(np.float16))


class TextReader(CompanionReader):
    """Reads the text embeddings of the records of a main set."""

    def __init__(self, main: ArrayReader, source: ArrayReader) -> None:
        """Open the embeddings in `source`, which may be `main` itself.

        Raises InputError if it has no embeddings, or if a table to join them is missing.
        """
        self.info = text_info(source.location, source.manifest)
        super().__init__(main, source, "text embedding")
        self.null = null_embedding(self.info)
        """Embedding of the empty caption, (null_length, dim) float16."""

    def read(self, members: Members, positions: np.ndarray, seed: int, faults: Faults) -> tuple[Tensor, Tensor]:
        """Return embeddings (b, n, dim) float16, zero after each row's length, and lengths (b,) int64.

        Where records have several captions, one is drawn for each sample. Rows with faults get the embedding of the
        empty caption; there is always room for it, so that a caption can be dropped.

        Args:
            members: Members of any array of the records in the main set.
            positions: Global positions of the samples (b,) int64.
            seed: Seed of the run.
            faults: Faults of the batch.
        """
        records, rows = self.rows(members, faults)
        text, info = self._drawn(records, rows, positions, seed), self.info
        values, lengths = self.source.sequences(text, info.dim, info.config.max_length, info.null_length, faults)
        bad = list(faults)
        values[bad] = 0
        values[bad, : info.null_length] = self.null
        lengths[bad] = info.null_length
        return values, lengths

    def _drawn(self, records: np.ndarray, rows: np.ndarray, positions: np.ndarray, seed: int) -> Members:
        """Return the member of one caption of each record, by index rows (b,) of the source."""
        names = self.source.manifest.text_arrays
        if len(names) == 1:
            return Members.of(records, rows, names[0])
        # A record's captions are its first arrays; those after its last have length 0.
        counts = sum((rows[f"{name}_length"] > 0).astype(np.int64) for name in names)
        numbers = (uniforms_at(positions, seed, Stream.CAPTION) * counts).astype(np.int64)
        return Members.of_one(records, rows, names, numbers)
