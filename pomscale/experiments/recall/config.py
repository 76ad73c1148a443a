"""Settings of recall: the task, the network and its training."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import Field, PositiveInt, model_validator

from pomscale.config.load import validate
from pomscale.config.mixer import (
    AttentionMixerConfig,
    Mixer,
    MixerField,
    MixerName,
    PomMixerConfig,
    check_mixer,
    resolve_mixer,
)
from pomscale.config.section import NonNegativeInt, PositiveFloat, Section, Seed
from pomscale.config.yaml_file import RecipeSource


class RecallConfig(Section):
    """One network on one difficulty of the task. The defaults are the full task, over 10,240 tokens."""

    kind: Literal["recall"] = "recall"
    seed: Seed = 0
    num_tokens: PositiveInt = Field(10240, description="Tokens of a sequence: pairs, fillers and questions.")
    num_pairs: PositiveInt = Field(256, description="Pairs of a key and a value in a sequence; no key is there twice.")
    num_questions: PositiveInt = Field(64, description="Keys of pairs whose value is asked for.")
    num_keys: PositiveInt = Field(1024, description="Keys to draw from.")
    num_values: Annotated[int, Field(ge=2)] = Field(64, description="Values to draw from; chance is one over it.")
    num_fillers: PositiveInt = Field(1024, description="Tokens to draw from that say nothing.")
    mixer: MixerField = Field("pom", description="As model.mixer of a training recipe.")
    degree: PositiveInt = 2
    expand: PositiveInt = 2
    num_heads: PositiveInt = 4
    dim: PositiveInt = 256
    depth: PositiveInt = 4
    ffn_expansion: PositiveInt = 2
    batch: PositiveInt = 32
    num_steps: PositiveInt = 20000
    warmup_steps: NonNegativeInt = 500
    lr: PositiveFloat = 1e-3
    num_evaluated: PositiveInt = Field(
        1024, description="Sequences that the accuracy is measured on, never trained on."
    )

    @model_validator(mode="after")
    def _check(self) -> RecallConfig:
        if self.num_pairs + self.num_questions > self.num_tokens:
            raise ValueError("num_tokens: fewer than num_pairs + num_questions")
        if self.num_pairs > self.num_keys:
            raise ValueError(f"num_pairs: no key is there twice, so at most num_keys = {self.num_keys}")
        if self.num_questions > self.num_pairs:
            raise ValueError(f"num_questions: at most num_pairs = {self.num_pairs}")
        if self.depth % len(self._pattern):
            raise ValueError(f"mixer: a pattern of {len(self._pattern)} does not divide depth {self.depth}")
        for written in self._pattern:
            if isinstance(written, PomMixerConfig) and written.rope:
                raise ValueError("mixer: rope: tokens of this task have no positions; leave it out")
            check_mixer("mixer", written, self._resolved(written), self.dim)
        return self

    @property
    def _pattern(self) -> list[MixerName | PomMixerConfig | AttentionMixerConfig]:
        return self.mixer if isinstance(self.mixer, list) else [self.mixer]

    def _resolved(self, written: MixerName | PomMixerConfig | AttentionMixerConfig) -> Mixer:
        return resolve_mixer(written, degree=self.degree, expand=self.expand, num_heads=self.num_heads, num_axes=2)

    @property
    def mixers(self) -> list[Mixer]:
        """The mixer of every block."""
        return [self._resolved(written) for written in self._pattern] * (self.depth // len(self._pattern))


def read_recall(overrides: list[str]) -> RecallConfig:
    """Return the settings with changes a.b=c. Raises RecipeError, which lists every problem."""
    source = RecipeSource({"kind": "recall"}, {(): "recall"})
    for override in overrides:
        source.apply(override)
    return cast(RecallConfig, validate(source, {"recall": RecallConfig}))
