"""Recipe or cluster profile + overrides -> a validated object, or one error that lists every problem."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Union, cast, get_args

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from pomscale.config.cluster import ClusterProfile
from pomscale.config.encode import EncodeRecipe
from pomscale.config.experiment import ExperimentRecipe
from pomscale.config.pipeline import PipelineRecipe
from pomscale.config.section import Section
from pomscale.config.shipped import known_clusters, recipe_file, shipped_recipes
from pomscale.config.train import TrainRecipe
from pomscale.config.yaml_file import KeyPath, RecipeError, RecipeSource, dump_yaml, read_source

Recipe = TrainRecipe | EncodeRecipe | PipelineRecipe | ExperimentRecipe

_KINDS: dict[str, type[Section]] = {
    "train": TrainRecipe,
    "encode": EncodeRecipe,
    "pipeline": PipelineRecipe,
    "experiment": ExperimentRecipe,
}
_CLUSTER: dict[str, type[Section]] = {"cluster": ClusterProfile}

_ANY_KIND: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        Union[TrainRecipe, EncodeRecipe, PipelineRecipe, ExperimentRecipe, ClusterProfile], Field(discriminator="kind")
    ]
)

# kind -> the command that takes such a file.
_COMMANDS = {
    "train": "pomscale train",
    "encode": "pomscale data encode",
    "pipeline": "pomscale launch",
    "experiment": "pomscale experiment",
    "cluster": "pomscale launch --cluster",
}


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, merge and validate a recipe, given by path or by the name of a shipped one.

    Raises RecipeError (exit code 2), which lists every problem as `file:line: key: what is wrong; remedy`.
    """
    return cast(Recipe, validate(read_recipe_source(path, overrides), _KINDS))


def load_train_recipe(path: str | Path, overrides: list[str] | None = None) -> TrainRecipe:
    """Load a recipe as load_recipe does; a recipe of a kind other than `train` is an error."""
    recipe = load_recipe(path, overrides)
    if not isinstance(recipe, TrainRecipe):
        raise _other_kind(path, recipe.kind, "training needs kind: train")
    return recipe


def load_encode_recipe(path: str | Path, overrides: list[str] | None = None) -> EncodeRecipe:
    """Load a recipe as load_recipe does; a recipe of a kind other than `encode` is an error."""
    recipe = load_recipe(path, overrides)
    if not isinstance(recipe, EncodeRecipe):
        raise _other_kind(path, recipe.kind, "encoding needs kind: encode")
    return recipe


def load_experiment(path: str | Path, overrides: list[str] | None = None, *, small: bool = False) -> ExperimentRecipe:
    """Load a recipe as load_recipe does; a recipe of a kind other than `experiment` is an error.

    With `small`, the fields in its section `small` replace others, and NAME becomes NAME-small; overrides come last.
    """
    source = read_recipe_source(path)
    if small and source.values.get("kind") == "experiment":
        if not source.values.get("small"):
            raise RecipeError([f"{source.origin(('small',))}: small: this experiment has no small version"])
        source.set(("name",), f"{source.values.get('name')}-small", source.origin(("name",)))
        source.raise_section("small")
    for override in overrides or []:
        source.apply(override)
    recipe = cast(Recipe, validate(source, _KINDS))
    if not isinstance(recipe, ExperimentRecipe):
        raise _other_kind(path, recipe.kind, "an experiment needs kind: experiment")
    return recipe


def _other_kind(path: str | Path, kind: str, wanted: str) -> RecipeError:
    return RecipeError([f"{path}: kind: this is a recipe for `{_COMMANDS[kind]}`; {wanted}"])


def load_cluster(name_or_path: str | Path, overrides: list[str] | None = None) -> ClusterProfile:
    """Read a cluster profile as load_recipe reads a recipe; profiles inherit from each other in the same way.

    A single word is the name of a shipped profile; a string that ends in .yaml or has a slash is a path.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
        known = known_clusters()
        if path.name not in known:
            nearest = _suggest(path.name, str(list(known)))
            raise RecipeError(
                [
                    f"cluster {path.name!r}: there is no such profile{nearest}; known are {', '.join(known)}; "
                    "or give the path of a YAML file of kind cluster"
                ]
            )
        path = known[path.name]
    return cast(ClusterProfile, validate(read_recipe_source(path, overrides), _CLUSTER))


def read_recipe_source(name_or_path: str | Path, overrides: list[str] | None = None) -> RecipeSource:
    """Read a recipe, given by path or by the name of a shipped one, before it is validated.

    Raises RecipeError as read_source does, and when there is no such recipe.
    """
    try:
        return read_source(recipe_file(name_or_path), overrides)
    except FileNotFoundError:
        nearest = _suggest(Path(name_or_path).as_posix().removesuffix(".yaml"), str(list(shipped_recipes())))
        hint = f"{nearest} (`pomscale config list` names all shipped recipes)" if nearest else ""
        raise RecipeError([f"{name_or_path}: no such recipe file{hint}"]) from None


def validate(source: RecipeSource, kinds: dict[str, type[Section]] = _KINDS) -> Section:
    """Build the recipe or profile that `source` describes.

    Raises RecipeError, which lists every problem, also if its kind is none of `kinds`.
    """
    kind = source.values.get("kind")
    section = kinds.get(kind) if isinstance(kind, str) else None
    if section is None:
        raise RecipeError([f"{source.origin(('kind',))}: kind: {_wrong_kind(kind, kinds)}"])
    try:
        return section.model_validate(source.values)
    except ValidationError as error:
        raise RecipeError(_explain(error, source, section)) from None


def _wrong_kind(kind: Any, kinds: dict[str, type[Section]]) -> str:
    if kind is None:
        return "missing; it says what kind of section this is"
    if kind in _COMMANDS:
        return f"this file is for `{_COMMANDS[kind]}`; here kind must be one of {', '.join(map(repr, kinds))}"
    known = ", ".join(map(repr, kinds))
    return f"{kind!r} is none of {known}{_suggest(str(kind), known)}"


def dump_recipe(recipe: Recipe | ClusterProfile) -> str:
    """The resolved recipe as YAML that load_recipe reads back to an equal object."""
    return dump_yaml(recipe.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """JSON schema of recipes and cluster profiles, for editors.

    No key is required in it, since any may be inherited from a base.
    """
    kinds = {**_KINDS, **_CLUSTER}
    schema = _ANY_KIND.json_schema()
    _relax(schema)
    for kind in kinds.values():
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


def _explain(error: ValidationError, source: RecipeSource, root: type[Section]) -> list[str]:
    problems: dict[KeyPath, list[str]] = {}
    for item in error.errors(include_url=False):
        path = _key_path(item["loc"], source.values, missing=item["type"] == "missing")
        message = _message(item, path, source.values, root)
        # A validator over a whole section names the key it means: `key: what is wrong`.
        named = re.match(r"([a-z_]+(?:\.\w+)*): (?=\S)", message)
        if named and item["type"] in ("value_error", "union_tag_invalid", "union_tag_not_found"):
            path, message = (*path, *named[1].split(".")), message[named.end() :]
        if message not in problems.setdefault(path, []):
            problems[path].append(message)
    return [
        f"{source.origin(path)}: {'.'.join(path) or 'recipe'}: {'; or '.join(messages)}"
        for path, messages in problems.items()
    ]


def _key_path(loc: tuple[int | str, ...], values: Any, *, missing: bool) -> KeyPath:
    """Return pydantic's location without the union tags that it inserts, which no user wrote."""
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


def _message(  # noqa: PLR0911 (one line per kind of error)
    item: Any, path: KeyPath, values: dict[str, Any], root: type[Section]
) -> str:
    match item["type"]:
        case "extra_forbidden":
            return "unknown key" + _suggest_key(path, values, root)
        case "missing":
            return "missing; set it here or in a base file"
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
    """Return the key that tells a section's kind. pydantic quotes keys, and writes functions of that name with ()."""
    return item["ctx"]["discriminator"].strip("'").removesuffix("()")


def _suggest(word: str, quoted: str) -> str:
    """Return a question with the nearest of the words in single quotes, or '' if none is near."""
    nearest = difflib.get_close_matches(word, re.findall(r"'([^']+)'", quoted), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _suggest_key(path: KeyPath, values: dict[str, Any], root: type[Section]) -> str:
    """Return a hint: the nearest valid key of the same section, else the same word elsewhere in the recipe."""
    section = _section_at(root, path[:-1], values)
    siblings = list(section.model_fields) if section else []
    nearest = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.6)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    elsewhere = [dotted for dotted in _all_keys(root) if dotted.rsplit(".", 1)[-1] == path[-1]]
    if ".".join(key for key in path if not key.isdigit()) in elsewhere:
        return f"; another kind of this section has it, the keys of this one are {', '.join(siblings)}"
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
    section, candidates = root, [root]
    for key in path:
        if isinstance(values, list):  # an entry is of one of the kinds that the list may hold
            values = values[int(key)]
        else:
            values = values.get(key) if isinstance(values, dict) else None
            candidates = _sections_of(section.model_fields[key].annotation) if key in section.model_fields else []
        if not candidates:
            return None
        section = next((c for c in candidates if _is_tagged(c, values)), candidates[0])
    return section


def _is_tagged(section: type[BaseModel], values: Any) -> bool:
    """Return whether `name` or `kind` in the values says that they are this kind of section."""
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
