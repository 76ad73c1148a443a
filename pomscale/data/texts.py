"""Text conditions of a network, made from the stored embeddings of captions."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from pomscale.base.condition import Text
from pomscale.data.dataset import Samples
from pomscale.data.loader import MicroBatch
from pomscale.data.readers.texts import null_embedding
from pomscale.shards.schema import TextInfo


def text_batch(batch: MicroBatch | Samples, texts: TextInfo) -> Text:
    """Return the captions of a batch, padded to the max_length of their encoders.

    All batches of a run then have one shape: a network is compiled once, and its result does not depend on which
    captions share a batch.
    """
    assert batch.text is not None
    assert batch.text_lengths is not None
    length = texts.max_length
    embeddings = pad(batch.text, (0, 0, 0, length - batch.text.shape[1]))
    return Text(embeddings, torch.arange(length) < batch.text_lengths[:, None])


def null_text(texts: TextInfo) -> Text:
    """Return the stored embedding of the empty caption as a batch of one: (1 n width) float16, n the max_length."""
    null, length = null_embedding(texts), texts.max_length
    return Text(pad(null, (0, 0, 0, length - len(null)))[None], (torch.arange(length) < len(null))[None])
