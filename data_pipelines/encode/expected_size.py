"""Size of a set of features before it is encoded: it is known exactly, and may be larger than the pictures' own."""

from __future__ import annotations

import io

import numpy as np

from data_pipelines.encode.setup import EncodeSetup
from data_pipelines.shards.writers import Record, ShardWriter


def expected_size(setup: EncodeSetup) -> list[str]:
    """Return a line for people per set of features that an encode writes, with its bytes per sample and in all."""
    encoder, num_samples = setup.encoders.features, len(setup.table)
    if encoder is None or not num_samples:
        return []
    item = setup.item(0)
    lines = []
    for variant in setup.variants:
        target = variant.targets[0]
        grid, dim = encoder.grid(*target), encoder.dim(*target[-2:])
        shape = (int(np.prod(grid)), dim)
        stream = io.BytesIO()
        arrays = {name: np.zeros(shape, np.float16) for name in setup.arrays}
        record = Record(item.key, arrays, item.label, next(iter(item.captions), None), {"source": item.where})
        ShardWriter(stream, setup.arrays).add(record)
        per_sample = stream.tell()
        lines.append(
            f"features {variant.output}: {'x'.join(map(str, grid))} tokens of {dim}, float16"
            f"{', also of the mirrored pictures' if len(arrays) > 1 else ''}: {per_sample:,} bytes per sample, "
            f"{per_sample * num_samples / 1e9:,.3f} GB for {num_samples:,} samples"
        )
    return lines
