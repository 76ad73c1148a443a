"""Network of recall: our blocks between embeddings of words and values, and a classifier of values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pomscale.config.block import BlockConfig
from pomscale.experiments.recall.config import RecallConfig
from pomscale.experiments.recall.data import RecallBatch, Vocabulary
from pomscale.models.block import Block, build_mixer
from pomscale.models.init import init_weights


class RecallNetwork(nn.Module):
    """Network that predicts the values that are asked for: RecallBatch -> logits (b, q, num_values).

    The blocks are those of pictures; their condition is a learned vector.
    """

    def __init__(self, config: RecallConfig) -> None:
        super().__init__()
        self.num_questions = config.num_questions
        self.word_embedding = nn.Embedding(Vocabulary.of(config).size, config.dim)
        self.value_embedding = nn.Embedding(config.num_values + 1, config.dim)
        self.condition = nn.Embedding(1, config.dim)
        self.trunk = nn.ModuleList(
            Block(BlockConfig(config.dim, config.ffn_expansion), build_mixer(config.dim, mixer))
            for mixer in config.mixers
        )
        self.norm = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.head = nn.Linear(config.dim, config.num_values)

    def forward(self, batch: RecallBatch) -> Tensor:
        """Predict the values of the last tokens."""
        x = self.word_embedding(batch.words) + self.value_embedding(batch.values)
        c = self.condition(torch.zeros(1, 1, dtype=torch.int64, device=x.device))
        for block in self.trunk:
            x = block(x, c)
        logits: Tensor = self.head(self.norm(x[:, -self.num_questions :]))
        return logits


def build_network(config: RecallConfig) -> RecallNetwork:
    """Return a network with initial weights on the CPU."""
    network = RecallNetwork(config)
    init_weights(network, config.seed)
    return network
