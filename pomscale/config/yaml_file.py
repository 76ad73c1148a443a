"""Recipe files before validation: YAML with `base:` inheritance and `a.b.c=value` overrides.

Every value remembers where it was written, so that an error can name file and line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pomscale.base.errors import InputError

KeyPath = tuple[str, ...]


class RecipeError(InputError):
    """All problems of one recipe, each on a line of its own."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass
class RecipeSource:
    """Merged mapping of a recipe and, for every key path in it, the `file:line` or the override that set it."""

    values: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str:
        """Return where `path` was written; for a missing key, where the nearest enclosing section was."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def set(self, keys: KeyPath, value: Any, origin: str) -> None:
        """Replace what is at `keys` by a value. Raises RecipeError if the path leads through a value."""
        section = self.values
        for depth, key in enumerate(keys[:-1]):
            if section.get(key) is None:
                section[key] = {}
                self.origins[keys[: depth + 1]] = origin
            section = section[key]
            if not isinstance(section, dict):
                raise RecipeError([f"{origin}: {'.'.join(keys[: depth + 1])} is a value, not a section"])
        section[keys[-1]] = value
        # What the files said below this key is replaced, so its origins are dropped.
        self.origins = {path: where for path, where in self.origins.items() if path[: len(keys)] != keys}
        self.origins[keys] = origin

    def apply(self, override: str) -> None:
        """Set what an override, section.key=value, says. Raises RecipeError for a malformed one."""
        dotted, separator, text = override.partition("=")
        keys = tuple(dotted.split("."))
        if not separator or not all(keys):
            raise RecipeError([f"override {override!r}: must look like section.key=value"])
        try:
            value = yaml.load(text, Loader=_Yaml12Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError([f"override {override!r}: the value is not valid YAML: {error}"]) from error
        self.set(keys, value, f"override {override!r}")

    def raise_section(self, key: str) -> None:
        """Let the fields in the section at `key` replace those of the recipe, each as a whole; remove the section."""
        section = self.values.pop(key)
        if not isinstance(section, dict):
            raise RecipeError([f"{self.origin((key,))}: {key}: must be a section"])
        where = {path[1:]: origin for path, origin in self.origins.items() if path[:1] == (key,) and len(path) > 1}
        self.origins = {path: origin for path, origin in self.origins.items() if path[0:1] not in {(key,), *where}}
        self.origins |= where
        self.values |= section


class _Yaml12Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number and 20:00:00 as a string, as YAML 1.2 does.

    PyYAML implements YAML 1.1, in which the first is a string and the second is 72000, a number to the base of 60.
    """


class _Yaml12Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the string '1e-4', so that _Yaml12Loader reads it back as a string."""


for _resolver in (_Yaml12Loader, _Yaml12Dumper):
    _resolver.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


_INT = "tag:yaml.org,2002:int"
_Yaml12Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != _INT]
    for first, resolvers in _Yaml12Loader.yaml_implicit_resolvers.items()
}
_Yaml12Loader.add_implicit_resolver(
    _INT,
    re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML that read_source reads back to equal values."""
    return yaml.dump(values, Dumper=_Yaml12Dumper, sort_keys=False, default_flow_style=None, width=120)


def read_source(path: str | Path, overrides: list[str] | None = None) -> RecipeSource:
    """Read a recipe file, its bases and the command line's overrides into one mapping.

    Raises FileNotFoundError without such a file, and RecipeError for a missing base, YAML that does not parse, a
    duplicate key, bases in a circle or a malformed override.
    """
    source = _read_with_bases(Path(path), seen=())
    for override in overrides or []:
        source.apply(override)
    return source


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> RecipeSource:
    resolved = path.resolve()
    if resolved in seen:
        chain = " -> ".join(str(p) for p in (*seen, resolved))
        raise RecipeError([f"{path}: base: recipes inherit from each other in a circle: {chain}"])
    source = _read_file(path)
    base = source.values.pop("base", None)
    if base is None:
        return source
    if not isinstance(base, str):
        raise RecipeError([f"{source.origin(('base',))}: base: must be one path, relative to this file"])
    try:
        parent = _read_with_bases(path.parent / base, (*seen, resolved))
    except FileNotFoundError:
        raise RecipeError([f"{source.origin(('base',))}: base: no such recipe {path.parent / base}"]) from None
    _merge(parent.values, source.values)
    # The root's origin stays the file the user named: a key missing everywhere is missing there.
    return RecipeSource(parent.values, {**parent.origins, **source.origins})


def _read_file(path: Path) -> RecipeSource:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path}: not a readable recipe file ({error})"]) from error
    try:
        loader = _Yaml12Loader(text)
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise RecipeError([f"{path}: not valid YAML: {error}"]) from error
    try:
        node = loader.get_single_node()
        origins: dict[KeyPath, str] = {(): f"{path}:1"}
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError([f"{path}:1: a recipe is a mapping of keys to values"])
        values = _construct(loader, node, (), path, origins)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise RecipeError([f"{path}:{line}: not valid YAML: {error.problem or error.context}"]) from error
    finally:
        loader.dispose()
    return RecipeSource(values, origins)


def _construct(loader: yaml.SafeLoader, node: yaml.Node, path: KeyPath, file: Path, origins: dict[KeyPath, str]) -> Any:
    """Return the node's value, and note the line of every key below it in `origins`."""
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*path, str(i)), file, origins) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        try:
            return loader.construct_object(node)
        except ValueError as error:  # it looks like a date or a number but is none: 2024-13-45
            raise RecipeError([f"{file}:{node.start_mark.line + 1}: {'.'.join(path)}: {error}"]) from error
    loader.flatten_mapping(node)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node))
        line = key_node.start_mark.line + 1
        key_path = (*path, key)
        if key in values:
            raise RecipeError([f"{file}:{line}: {'.'.join(key_path)}: written twice (first: {origins[key_path]})"])
        origins[key_path] = f"{file}:{line}"
        values[key] = _construct(loader, value_node, key_path, file, origins)
    return values


def _merge(base: dict[str, Any], child: dict[str, Any]) -> None:
    """Merge child into base: sections of the same kind are merged key by key, all else is replaced."""
    for key, value in child.items():
        inherited = base.get(key)
        if isinstance(value, dict) and isinstance(inherited, dict) and not _is_another_kind(value, inherited):
            _merge(inherited, value)
        else:
            base[key] = value


def _is_another_kind(section: dict[str, Any], inherited: dict[str, Any]) -> bool:
    """Return whether both say by `kind` or `name` what they are, and disagree."""
    return any(tag in section and section[tag] != inherited.get(tag, section[tag]) for tag in ("kind", "name"))


def override(key: str, text: str) -> str:
    """Return the override that sets a key to a text, also where YAML would read that as a number or a date."""
    try:
        is_plain = yaml.load(text, Loader=_Yaml12Loader) == text
    except (yaml.YAMLError, ValueError):
        is_plain = False
    return f"{key}={text if is_plain else json.dumps(text, ensure_ascii=False)}"
