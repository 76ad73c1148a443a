"""Base class and types of the parts of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

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
