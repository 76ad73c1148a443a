"""Base class and types of the parts of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from pomscale.base.names import MAX_NAME_BYTES

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _no_value_is_empty(value: object) -> object:
    return "" if value is None else value


Text = Annotated[str, BeforeValidator(_no_value_is_empty)]
"""Text of a mapping that people write; `--set a.b=` and `b:` are the empty text, though YAML reads null."""


def _fits_a_folder(name: str) -> str:
    num_bytes = len(name.encode())
    if num_bytes > MAX_NAME_BYTES:
        raise ValueError(f"{num_bytes} bytes; it is the name of a folder, so give at most {MAX_NAME_BYTES}")
    return name


FolderName = Annotated[str, Field(min_length=1), AfterValidator(_fits_a_folder)]
"""Name that becomes that of a folder."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class GrownSection(Section):
    """A section that got fields later, which are left out of dumps where they have their default values.

    Identities of runs and of clips' states are made of dumps, so those of older recipes must not change.
    """

    _later: ClassVar[frozenset[str]]
    """Names of these fields."""

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        unsaid = {name for name in self._later if getattr(self, name) == fields[name].get_default()}
        return {name: value for name, value in dump(self).items() if name not in unsaid}
