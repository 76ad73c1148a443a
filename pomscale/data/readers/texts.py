"""Text embeddings of a dataset's records: from its own shards, or from a companion set joined by key."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pomscale.base.keyed_random import Stream
from pomscale.data.draws import uniforms_at
from pomscale.data.readers.arrays import ArrayReader, Faults, Members
from pomscale.data.readers.companion import CompanionReader
from pomscale.shards.schema import TextInfo, text_info
from pomscale.shards.texts import joined


def null_embedding(info: TextInfo) -> Tensor:
    """Return the embedding of the empty caption, (n, width) float16: those of all encoders, one behind the other."""
    parts = [
        np.frombuffer(encoder.null_bytes, "<f2").reshape(encoder.null_length, encoder.dim) for encoder in info.encoders
    ]
    return torch.from_numpy(joined(parts).astype(np.float16))


class TextReader(CompanionReader):
    """Reads the text embeddings of the records of a main set."""

    def __init__(self, main: ArrayReader, source: ArrayReader) -> None:
        """Open the embeddings in `source`, which may be `main` itself.

        Raises InputError if it has no embeddings, or if a table to join them is missing.
        """
        self.info = text_info(source.location, source.manifest)
        super().__init__(main, source, "text embedding")
        self.null = null_embedding(self.info)
        """Embedding of the empty caption, (n, width) float16."""

    def read(self, members: Members, positions: np.ndarray, seed: int, faults: Faults) -> tuple[Tensor, Tensor]:
        """Return embeddings (b, n, width) float16, zero after each row's length, and lengths (b,) int64.

        Where records have several captions, one is drawn for each sample; all encoders' embeddings are of it. Rows with
        faults get the embedding of the empty caption; there is always room for it, so that a caption can be dropped.

        Args:
            members: Members of any array of the records in the main set.
            positions: Global positions of the samples (b,) int64.
            seed: Seed of the run.
            faults: Faults of the batch.
        """
        records, rows = self.rows(members, faults)
        numbers = self._drawn(rows, positions, seed)
        read = []
        for encoder, names in zip(self.info.encoders, self.source.manifest.arrays_by_encoder, strict=True):
            if numbers is None:
                text = Members.of(records, rows, names[0])
            else:
                text = Members.of_one(records, rows, names, numbers)
            length, room = encoder.config.stored_length, encoder.null_length
            read.append(self.source.sequences(text, encoder.dim, length, room, faults))
        values, lengths = read[0] if len(read) == 1 else _side_by_side(read, list(faults), len(self.null))
        bad = list(faults)
        values[bad] = 0
        values[bad, : len(self.null)] = self.null
        lengths[bad] = len(self.null)
        return values, lengths

    def _drawn(self, rows: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray | None:
        """Return the number of one caption of each record, by index rows (b,) of the source; None if they have one."""
        names = self.source.manifest.arrays_by_encoder[0]
        if len(names) == 1:
            return None
        # A record's captions are its first arrays; those after its last have length 0.
        counts = sum((rows[f"{name}_length"] > 0).astype(np.int64) for name in names)
        return (uniforms_at(positions, seed, Stream.CAPTION) * counts).astype(np.int64)


def _side_by_side(read: Sequence[tuple[Tensor, Tensor]], bad: Sequence[int], room: int) -> tuple[Tensor, Tensor]:
    """Return embeddings and lengths of several encoders as those of one, row by row as `joined`.

    Args:
        read: Embeddings (b, n, dim) and lengths (b,) by encoder.
        bad: Rows with faults, whose contents mean nothing.
        room: Least number of tokens of the result.
    """
    total = torch.stack([lengths for _, lengths in read]).sum(0)
    total[list(bad)] = 0
    width = max(values.shape[2] for values, _ in read)
    together = torch.zeros((len(total), max(room, int(total.max())), width), dtype=torch.float16)
    for row in set(range(len(total))) - set(bad):
        begin = 0
        for values, lengths in read:
            end = begin + int(lengths[row])
            together[row, begin:end, : values.shape[2]] = values[row, : end - begin]
            begin = end
    return together, total
