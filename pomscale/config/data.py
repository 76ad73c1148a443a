"""The part of a training recipe that says which datasets are read, and how."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from pomscale.config.section import Fraction, GrownSection, NonNegativeInt, PositiveFloat, Section


class MixtureComponentConfig(GrownSection):
    """One dataset of a mixture."""

    _later: ClassVar[frozenset[str]] = frozenset({"features"})

    path: str = Field(description="Folder or URL with manifest.json.")
    weight: PositiveFloat = Field(1.0, description="Share of the samples, relative to the other components.")
    text: str | None = Field(None, description="Companion set of text embeddings, joined by key.")
    features: str | None = Field(None, description="Companion set of a teacher's features, joined by key.")


class CacheConfig(Section):
    """Cache of whole shards on a disk of the node. Datasets behind a URL need one."""

    path: str = Field(description="Folder on this node's own disk; processes of the node share it.")
    max_gib: PositiveFloat = Field(100.0, description="Size above which the least recently used shards are deleted.")


class DataConfig(GrownSection):
    """Datasets to train on, and the way to read them."""

    _later: ClassVar[frozenset[str]] = frozenset({"features"})

    path: str | None = Field(
        None, description="Folder or URL with manifest.json, as written by `pomscale data encode`."
    )
    text: str | None = Field(None, description="Companion set of text embeddings for `path`, joined by key.")
    features: str | None = Field(
        None, description="Companion set of a teacher's features for `path`, joined by key, for the alignment loss."
    )
    mixture: list[MixtureComponentConfig] = Field([], description="Several datasets instead of `path`.")
    normalization: Literal["codec", "dataset"] = Field(
        "codec", description="codec: the codec's scaling factor; dataset: the measured per-channel mean and std."
    )
    flip_probability: Fraction = Field(0.5, description="Chance of the flipped copy, where the dataset has one.")
    shuffle_window: PositiveInt = Field(
        65536, description="Records shuffled together; larger is more random, smaller reads more sequentially."
    )
    num_threads: PositiveInt = Field(2, description="Reader threads per process.")
    prefetch: PositiveInt = Field(
        4,
        description="Micro-batches kept ready per process; besides, each thread has up to min(4, prefetch) in hand.",
    )
    reading: Literal["mapped", "streamed"] = Field(
        "mapped", description="mapped: from disk or cache; streamed: shards pass through memory, for object stores."
    )
    cache: CacheConfig | None = Field(None, description="Node-local copies of shards.")
    bad_samples: Literal["raise", "skip"] = Field(
        "raise", description="A sample that cannot be read ends the run, or is counted, listed and given weight 0."
    )
    max_bad_samples: NonNegativeInt = Field(100, description="skip: a run with more of them ends with an error.")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (self.path is None) == (not self.mixture):
            raise ValueError("give either `path` or `mixture`")
        for name in ("text", "features"):
            if getattr(self, name) is not None and self.mixture:
                raise ValueError(f"{name}: belongs to `path`; a mixture names `{name}` per component")
        if len({component.features is None for component in self.mixture}) > 1:
            raise ValueError("mixture: give `features` for all components, or for none")
        return self

    @property
    def components(self) -> list[MixtureComponentConfig]:
        """The datasets; `path` is a mixture of one."""
        if self.path is not None:
            return [MixtureComponentConfig(path=self.path, text=self.text, features=self.features)]
        return self.mixture
