"""Recipe file + overrides -> validated recipe, or one error that lists every problem."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from pomscale.config.schema import EncodeRecipe, Recipe, TrainRecipe
from pomscale.config.section import Section
from pomscale.config.source import KeyPath, RecipeError, RecipeSource, dump_yaml, read_source

_ADAPTER: TypeAdapter[TrainRecipe | EncodeRecipe] = TypeAdapter(Recipe)
_KINDS: dict[str, type[Section]] = {"train": TrainRecipe, "encode": EncodeRecipe}


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> TrainRecipe | EncodeRecipe:
    """Read, merge and validate a recipe.

    Raises RecipeError (exit code 2) that lists every problem as `file:line: key: what is wrong; remedy`.
    """
    try:
        source = read_source(path, overrides)
    except FileNotFoundError:
        raise RecipeError([f"{path}: no such recipe file"]) from None
    try:
        return _ADAPTER.validate_python(source.values)
    except ValidationError as error:
        raise RecipeError(_explain(error, source)) from None


def load_train_recipe(path: str | Path, overrides: list[str] | None = None) -> TrainRecipe:
    """As load_recipe; a recipe of another kind is an error."""
    recipe = load_recipe(path, overrides)
    if not isinstance(recipe, TrainRecipe):
        raise RecipeError([f"{path}: kind: this is a recipe for `pomscale data encode`; training needs kind: train"])
    return recipe


def load_encode_recipe(path: str | Path, overrides: list[str] | None = None) -> EncodeRecipe:
    """As load_recipe; a recipe of another kind is an error."""
    recipe = load_recipe(path, overrides)
    if not isinstance(recipe, EncodeRecipe):
        raise RecipeError([f"{path}: kind: this is a recipe for `pomscale train`; encoding needs kind: encode"])
    return recipe


def dump_recipe(recipe: TrainRecipe | EncodeRecipe) -> str:
    """The resolved recipe as YAML that load_recipe reads back to an equal object."""
    return dump_yaml(recipe.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """JSON schema for editors. Nothing is required in it, since a recipe may inherit any key from its base."""
    schema = _ADAPTER.json_schema()
    _relax(schema)
    for kind in (TrainRecipe, EncodeRecipe):
        properties = schema["$defs"][kind.__name__]["properties"]
        properties["base"] = {"type": "string", "description": "Recipe to inherit from, relative to this file."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "pomscale recipe", **schema}


def _relax(node: Any) -> None:
    if isinstance(node, dict):
        node.pop("required", None)
        node.pop("discriminator", None)
        if "oneOf" in node:  # without `required`, a partial recipe may fit several kinds
            node["anyOf"] = node.pop("oneOf")
        for value in node.values():
            _relax(value)
    elif isinstance(node, list):
        for value in node:
            _relax(value)


def _explain(error: ValidationError, source: RecipeSource) -> list[str]:
    problems: dict[KeyPath, list[str]] = {}
    for item in error.errors(include_url=False):
        path = _key_path(item["loc"][1:], source.values, missing=item["type"] == "missing")
        message = _message(item, path, source.values)
        # A validator over a whole section names the key it means: `key: what is wrong`.
        named = re.match(r"([a-z_.]+): (?=\S)", message)
        if named and item["type"] in ("value_error", "union_tag_invalid", "union_tag_not_found"):
            path, message = (*path, *named[1].split(".")), message[named.end() :]
        if message not in problems.setdefault(path, []):
            problems[path].append(message)
    return [
        f"{source.origin(path)}: {'.'.join(path) or 'recipe'}: {'; or '.join(messages)}"
        for path, messages in problems.items()
    ]


def _key_path(loc: tuple[int | str, ...], values: Any, *, missing: bool) -> KeyPath:
    """pydantic's location below the recipe's kind, without the union tags it inserts, which no user wrote."""
    path: list[str] = []
    current = values
    for i, part in enumerate(loc):
        in_dict = isinstance(current, dict) and part in current
        if in_dict or (isinstance(current, list) and isinstance(part, int) and part < len(current)):
            current = current[part]
        elif missing and i == len(loc) - 1:
            pass
        else:
            continue
        path.append(str(part))
    return tuple(path)


def _message(item: Any, path: KeyPath, values: dict[str, Any]) -> str:  # noqa: PLR0911 (one line per kind of error)
    match item["type"]:
        case "extra_forbidden":
            return "unknown key" + _suggest_key(path, values)
        case "missing":
            return "missing; set it here or in the base recipe"
        case "union_tag_not_found":
            return f"{_discriminator(item)}: missing; it says what kind of section this is"
        case "union_tag_invalid":
            tag, known = item["ctx"]["tag"], item["ctx"]["expected_tags"]
            return f"{_discriminator(item)}: {tag!r} is none of {known}{_suggest(tag, known)}"
        case "literal_error":
            wrong, known = item["input"], item["ctx"]["expected"]
            return f"must be {known}, got {wrong!r}{_suggest(str(wrong), known)}"
        case "value_error":
            return str(item["ctx"]["error"])
        case _:
            return f"{item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"


def _discriminator(item: Any) -> str:
    """The key that tells a section's kind: pydantic quotes a key, and calls a function of that name."""
    return item["ctx"]["discriminator"].strip("'").removesuffix("()")


def _suggest(word: str, quoted: str) -> str:
    """The nearest of the words that pydantic lists in single quotes."""
    nearest = difflib.get_close_matches(word, re.findall(r"'([^']+)'", quoted), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _suggest_key(path: KeyPath, values: dict[str, Any]) -> str:
    """The nearest valid key of the same section, else the same word elsewhere in the recipe."""
    root = _KINDS[values["kind"]]
    section = _section_at(root, path[:-1], values)
    siblings = list(section.model_fields) if section else []
    nearest = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.6)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    elsewhere = [dotted for dotted in _all_keys(root) if dotted.rsplit(".", 1)[-1] == path[-1]]
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    nearest = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.0)
    return f"; the nearest valid key is {nearest[0]!r}" if nearest else ""


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The Section classes inside an annotation (Optional, Annotated, Union)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_of(argument)]


def _section_at(root: type[BaseModel], path: KeyPath, values: Any) -> type[BaseModel] | None:
    section = root
    for key in path:
        if isinstance(values, list):  # the sections of a list are of one kind
            values = values[int(key)]
            continue
        values = values.get(key) if isinstance(values, dict) else None
        candidates = _sections_of(section.model_fields[key].annotation) if key in section.model_fields else []
        if not candidates:
            return None
        section = next((c for c in candidates if _is_tagged(c, values)), candidates[0])
    return section


def _is_tagged(section: type[BaseModel], values: Any) -> bool:
    """Whether `name` or `kind` in the values says that they are this kind of section."""
    fields = section.model_fields
    return isinstance(values, dict) and any(
        tag in fields and values.get(tag) in get_args(fields[tag].annotation) for tag in ("name", "kind")
    )


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, info in section.model_fields.items():
        keys.append(prefix + name)
        for inner in _sections_of(info.annotation):
            keys += _all_keys(inner, f"{prefix}{name}.")
    return keys
