"""Data of recall: sequences, each drawn from the seed and its own number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.experiments.recall.config import RecallConfig

# Sequences to evaluate on are numbered from here; no training reaches it.
EVALUATED_FROM = 2**40


@dataclass(frozen=True)
class RecallBatch:
    """Sequences of tokens, each a word and, for pairs, a value; all int64.

    words: (b, n) keys, then fillers, then keys that are asked for, see `Vocabulary`. values: (b, n) value of a pair's
    token, num_values for all others. answers: (b, q) values that belong to the last q tokens, the questions.
    """

    words: Tensor
    values: Tensor
    answers: Tensor

    def to(self, device: torch.device) -> RecallBatch:
        return RecallBatch(self.words.to(device), self.values.to(device), self.answers.to(device))


@dataclass(frozen=True)
class Vocabulary:
    """Numbers of words: key k is k as a pair's, and `asked` + k where it is asked for; filler f is `filler` + f."""

    filler: int
    asked: int
    size: int

    @classmethod
    def of(cls, config: RecallConfig) -> Vocabulary:
        filler = config.num_keys
        asked = filler + config.num_fillers
        return cls(filler, asked, asked + config.num_keys)


def recall_batch(config: RecallConfig, numbers: Sequence[int]) -> RecallBatch:
    """Return the sequences with these numbers."""
    drawn = [_sequence(config, number) for number in numbers]
    return RecallBatch(*(torch.from_numpy(np.stack(arrays)) for arrays in zip(*drawn, strict=True)))


def _sequence(config: RecallConfig, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = keyed_generator(config.seed, Stream.RECALL, number)
    vocabulary = Vocabulary.of(config)
    num_read = config.num_tokens - config.num_questions
    keys = generator.choice(config.num_keys, config.num_pairs, replace=False)
    answers = generator.integers(config.num_values, size=config.num_pairs)
    words = vocabulary.filler + generator.integers(config.num_fillers, size=config.num_tokens)
    values = np.full(config.num_tokens, config.num_values)
    at = generator.choice(num_read, config.num_pairs, replace=False)
    words[at], values[at] = keys, answers
    asked = generator.choice(config.num_pairs, config.num_questions, replace=False)
    words[num_read:] = vocabulary.asked + keys[asked]
    return words, values, answers[asked]
