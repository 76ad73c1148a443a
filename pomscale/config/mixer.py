"""The mixers of a recipe: names and tables as they are written, and what they say of a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, Union

from pydantic import Discriminator, Field, PositiveInt, StrictBool, Tag, TypeAdapter, model_validator

from pomscale.config.section import GrownSection, Section

MixerName = Literal["pom", "attention"]
FormName = Literal["product", "coefficients"]


class PomMixerConfig(Section):
    """Polynomial Mixer, in one of its two forms."""

    kind: Literal["pom"]
    form: FormName = Field(
        "product",
        description="Polynomial: product (PoM v1, arXiv 2411.12663) or coefficients (PoM v2, arXiv 2604.06129).",
    )
    degree: PositiveInt | None = Field(None, description="Degree k of the polynomial; null = model.degree.")
    expand: PositiveInt | None = Field(
        None,
        description="Width over dim of one polynomial piece (product) or of the features (coefficients); "
        "null = model.expand.",
    )
    heads: PositiveInt = Field(
        1, description="Coefficients: gates of a token, each shared by neighbouring channels; 1 = a gate per channel."
    )
    groups: PositiveInt = Field(1, description="Coefficients: groups of the linear map of the context; 1 = dense.")
    rope: StrictBool = Field(
        False,
        description="Coefficients: rotary positions in the self mixers, along row and column of pictures, and frame "
        "group, row and column of clips. The mixers that read a text have none.",
    )

    @model_validator(mode="after")
    def _check_form(self) -> PomMixerConfig:
        for key, is_set in (("heads", self.heads != 1), ("groups", self.groups != 1), ("rope", self.rope)):
            if self.form == "product" and is_set:
                raise ValueError(f"{key}: the product form (PoM v1) has none; set form: coefficients, or leave it out")
        return self


class AttentionMixerConfig(GrownSection):
    """Multi-head attention."""

    _later = frozenset({"qk_norm", "rope"})

    kind: Literal["attention"]
    heads: PositiveInt | None = Field(None, description="Number of heads; null = model.num_heads.")
    qk_norm: StrictBool = Field(False, description="RMS norm of the queries and of the keys of every head.")
    rope: StrictBool = Field(
        False, description="Rotary positions of queries and keys in the self mixers, along the axes of PoM's."
    )


def _shape(value: Any) -> str:
    """Return how a mixer is written: as a name or a table."""
    return "table" if isinstance(value, dict | Section) else "name"


def _shape_or_list(value: Any) -> str:
    return "list" if isinstance(value, list) else _shape(value)


_Name: TypeAlias = Annotated[MixerName, Tag("name")]
_Table: TypeAlias = Annotated[
    Annotated[Union[PomMixerConfig, AttentionMixerConfig], Field(discriminator="kind")], Tag("table")
]
MixerEntry: TypeAlias = Annotated[Union[_Name, _Table], Discriminator(_shape)]
MixerField: TypeAlias = Annotated[
    Union[_Name, _Table, Annotated[list[MixerEntry], Field(min_length=1), Tag("list")]],
    Discriminator(_shape_or_list),
]
"""Value of `model.mixer`."""


@dataclass(frozen=True)
class PomMixer:
    """PoM of a block; the fields are those of `PomMixerConfig`, and `rope` is the number of axes, or None."""

    form: FormName
    degree: int
    expand: int
    heads: int = 1
    groups: int = 1
    rope: Literal[2, 3] | None = None
    kind: ClassVar[MixerName] = "pom"

    def width(self, dim: int) -> int:
        """Return the number W of features of a token."""
        return self.expand * dim * (self.degree if self.form == "product" else 1)

    def num_gates(self, dim: int) -> int:
        """Return the number of gates of a token."""
        return self.width(dim) if self.heads == 1 else self.heads

    def folds(self, queries_per_state: int) -> bool:
        """Return whether the output map is applied to states and not to tokens: y_n = sum_h s_nh (Wo_h H_h)."""
        return self.heads > 1 and queries_per_state > 1

    def without_rope(self) -> PomMixer:
        """Return the mixer for tokens without positions, such as those of a text."""
        return replace(self, rope=None)


@dataclass(frozen=True)
class AttentionMixer:
    """Attention of a block; the fields are those of `AttentionMixerConfig`, and `rope` is the number of axes."""

    heads: int
    qk_norm: bool = False
    rope: Literal[2, 3] | None = None
    kind: ClassVar[MixerName] = "attention"

    def without_rope(self) -> AttentionMixer:
        """Return the mixer for tokens without positions, such as those of a text."""
        return replace(self, rope=None)


Mixer: TypeAlias = PomMixer | AttentionMixer


def resolve_mixer(
    written: MixerName | PomMixerConfig | AttentionMixerConfig,
    *,
    degree: int,
    expand: int,
    num_heads: int,
    num_axes: Literal[2, 3],
) -> Mixer:
    """Return the mixer that an entry of `model.mixer` means.

    Args:
        written: the entry.
        degree: value of model.degree, for what the entry leaves open.
        expand: value of model.expand, likewise.
        num_heads: value of model.num_heads, likewise.
        num_axes: axes of a token's position in this kind of model.
    """
    if isinstance(written, AttentionMixerConfig):
        return AttentionMixer(written.heads or num_heads, written.qk_norm, num_axes if written.rope else None)
    if written == "attention":
        return AttentionMixer(num_heads)
    if isinstance(written, PomMixerConfig):
        return PomMixer(
            written.form,
            written.degree or degree,
            written.expand or expand,
            written.heads,
            written.groups,
            num_axes if written.rope else None,
        )
    return PomMixer("product", degree, expand)


def mixers_of_recipe(model: Mapping[str, Any]) -> list[Mixer]:
    """Return the mixer of every block, in full, of the section `model` of a recipe that was read before.

    A mixer may be written as a name, a table or a list of these, with a degree of its own or that of the model; what is
    returned is equal if these mean the same.

    Args:
        model: the section as `model_dump(mode="json")` gives it.
    """
    written = TypeAdapter(MixerField).validate_python(model["mixer"])
    pattern = written if isinstance(written, list) else [written]
    given = {key: model[key] for key in ("degree", "expand", "num_heads")}
    axes: Literal[2, 3] = 3 if model["kind"] == "video" else 2
    return [resolve_mixer(one, **given, num_axes=axes) for one in pattern] * (model["depth"] // len(pattern))


def check_mixer(key: str, written: MixerName | PomMixerConfig | AttentionMixerConfig, mixer: Mixer, dim: int) -> None:
    """Raise ValueError, which names the key and a remedy, unless a mixer fits a trunk of width `dim`."""
    if isinstance(mixer, AttentionMixer):
        if dim % mixer.heads:
            own = isinstance(written, AttentionMixerConfig) and written.heads is not None
            name = f"{key}.heads" if own else "num_heads"
            raise ValueError(f"{name}: {mixer.heads} does not divide dim {dim}; set a divisor of it")
        _check_rope(key, mixer, {"rope": ("channels of a head", dim // mixer.heads)})
        return
    width = mixer.width(dim)
    if width % mixer.heads:
        raise ValueError(f"{key}.heads: {mixer.heads} do not divide expand x dim = {width}; set a divisor of it")
    if dim % mixer.groups:
        raise ValueError(f"{key}.groups: {mixer.groups} do not divide dim {dim}; set a divisor of it")
    _check_rope(key, mixer, {"rope": ("channels", width), "heads": ("gates", mixer.num_gates(dim))})


def _check_rope(key: str, mixer: Mixer, sizes: Mapping[str, tuple[str, int]]) -> None:
    """Raise ValueError unless the rotary positions of a mixer can turn vectors of these sizes."""
    if mixer.rope is None:
        return
    for name, (what, size) in sizes.items():
        pairs = rotary_pairs(size, mixer.rope)
        if 2 * sum(pairs) != size or min(pairs) < 1:
            needs = {2: "a multiple of 4", 3: "an even number from 6 on"}[mixer.rope]
            raise ValueError(f"{key}.{name}: rope along {mixer.rope} axes needs {needs}, got {size} {what}")


def rotary_pairs(width: int, num_axes: Literal[2, 3]) -> tuple[int, ...]:
    """Return the number of pairs of `width` channels or heads that each axis rotates.

    The rule is that of ops.pom.rotary, which needs torch; a test compares them. It serves widths of which it makes use
    completely, with a pair for every axis.
    """
    pairs = width // 2
    if num_axes == 2:
        return pairs // 2, pairs // 2
    side = (pairs + 1) // 3
    return pairs - 2 * side, side, side
