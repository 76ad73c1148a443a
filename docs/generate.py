"""Generate the reference pages that the code itself can tell: commands, recipe fields, metrics, the run folder's tree.

    python docs/generate.py            writes docs/reference/
    python docs/generate.py --check    writes nothing; exit code 1 if a page is out of date

A page of docs/reference/ that holds a line `<!-- begin NAME (generated) -->` gets what is generated under that name
between this line and `<!-- end NAME -->`; the rest of the page is written by hand.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pomscale.cli  # noqa: E402
import pomscale.runs.layout  # noqa: E402
from pomscale.config.load import json_schema  # noqa: E402
from pomscale.runs import metric_names  # noqa: E402

REFERENCE = ROOT / "docs" / "reference"
_BLOCK = re.compile(r"(<!-- begin (\S+) \(generated\) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """The pages with generated blocks as they should be, by path."""
    blocks = {
        "commands": commands(command_parser()),
        "recipe": recipe_fields(json_schema()),
        "metrics": metrics(),
        "run-folder": tree(pomscale.runs.layout),
    }
    found = {}
    for path in sorted(REFERENCE.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if _BLOCK.search(text):
            found[path] = _BLOCK.sub(lambda match: f"{match[1]}\n{blocks[match[2]]}\n\n{match[3]}", text)
    return found


def command_parser() -> argparse.ArgumentParser:
    """The parser of the `pomscale` command."""
    return pomscale.cli._parser()


def commands(parser: argparse.ArgumentParser) -> str:
    """A section for each verb, and one for each verb of its own."""
    parts: list[str] = []
    for name, help_text, verb in _verbs(parser):
        parts.append(f"## `pomscale {name}`")
        parts += _command(f"pomscale {name}", help_text, verb)
        for inner, inner_help, inner_verb in _verbs(verb):
            parts.append(f"### `pomscale {name} {inner}`")
            parts += _command(f"pomscale {name} {inner}", inner_help, inner_verb)
    return "\n\n".join(parts)


def _verbs(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                yield choice.dest, choice.help or "", action.choices[choice.dest]


def _command(name: str, help_text: str, parser: argparse.ArgumentParser) -> list[str]:
    """Description (or help text), usage and table of arguments; a command with verbs of its own has the first alone."""
    parts = _description(parser.description) or [_sentence(help_text)]
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    if any(isinstance(action, argparse._SubParsersAction) for action in actions):
        return parts
    words = [_word(action) for action in actions if not action.option_strings or action.required]
    if any(action.option_strings and not action.required for action in actions):
        words.append("[OPTIONS]")
    parts.append(f"```text\n{' '.join([name, *words])}\n```")
    if actions:
        rows = [f"| {_code(_argument(action))} | {_cell(_sentence(_help(parser, action)))} |" for action in actions]
        parts.append("\n".join(["| argument | meaning |", "|---|---|", *rows]))
    return parts


def _description(text: str | None) -> list[str]:
    """Paragraphs; one that is indented keeps its lines."""
    paragraphs = (text or "").strip("\n").split("\n\n")
    return [f"```text\n{part}\n```" if part.startswith(" ") else _text(part) for part in paragraphs if part.strip()]


def _metavar(action: argparse.Action) -> str:
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    metavar = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    return " ".join(metavar) if isinstance(metavar, tuple) else str(metavar)


def _argument(action: argparse.Action) -> str:
    """A positional argument's name, or an option with its value."""
    name = _metavar(action)
    values = "" if action.nargs == 0 else name + (" ..." if action.nargs in ("*", "+") else "")
    return f"{', '.join(action.option_strings)} {values}".strip()


def _word(action: argparse.Action) -> str:
    """An argument as the usage line has it."""
    text = _argument(action)
    return f"[{text}]" if action.nargs in ("*", "?") else text


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The help text with its %(default)s and the like filled in."""
    return parser._get_formatter()._expand_help(action) if action.help else ""


def recipe_fields(schema: dict[str, Any]) -> str:
    """Sections for each kind of file: a table of its fields, and one for each section below."""
    kinds = [option["$ref"].rsplit("/", 1)[1] for option in schema.get("oneOf", schema.get("anyOf", []))]
    parts: list[str] = []
    done: set[str] = set()
    for kind in kinds:
        name = schema["$defs"][kind]["properties"]["kind"]["const"]
        parts.append(f"## kind: {name}")
        for section in [kind, *_below(schema, kind)]:
            if section in done:
                continue
            done.add(section)
            if section != kind:
                parts.append(f"### {section}")
            parts.append(_section(schema, section))
    return "\n\n".join(part for part in parts if part)


def _below(schema: dict[str, Any], section: str) -> list[str]:
    """Names of the sections that a section leads to, in the order in which they are met."""
    met: list[str] = []

    def visit(name: str) -> None:
        for reference in re.findall(r"#/\$defs/(\w+)", str(schema["$defs"][name].get("properties", {}))):
            if reference not in met and reference != section:
                met.append(reference)
                visit(reference)

    visit(section)
    return met


def _section(schema: dict[str, Any], name: str) -> str:
    """What a section is, and the table of its fields."""
    section = schema["$defs"][name]
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in section["properties"].items():
        if key != "base":
            cells = _type(field), _default(schema, field), _sentence(_meaning(schema, field))
            lines.append(f"| `{key}` | {' | '.join(map(_cell, cells))} |")
    return "\n\n".join([_text(section.get("description", "")), "\n".join(lines)]).strip()


def _meaning(schema: dict[str, Any], field: dict[str, Any]) -> str:
    """The description of a field, or the first paragraph about the one section that it holds."""
    sections = re.findall(r"#/\$defs/(\w+)", str(field))
    inner = schema["$defs"][sections[0]].get("description", "") if len(sections) == 1 else ""
    return str(field.get("description") or inner.split("\n\n")[0])


def _type(field: dict[str, Any]) -> str:  # noqa: PLR0911 (one line per kind of type)
    """The type of a field in words, with links to the sections it leads to."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf", "allOf"):
        if several in field:
            return " or ".join(_type(option) for option in field[several])
    if "const" in field:
        return _code(str(field["const"]))
    if "enum" in field:
        return ", ".join(_code("null" if value is None else str(value)) for value in field["enum"])
    kind = field.get("type", "any")
    if kind == "array":
        if "prefixItems" in field:
            return "list of " + ", ".join(_type(item) for item in field["prefixItems"])
        return f"list of {_type(field.get('items', {}))}"
    if kind == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"mapping to {_type(field['additionalProperties'])}"
    names = {"integer": "int", "number": "float", "string": "text", "boolean": "true or false", "object": "mapping"}
    return " ".join([names.get(kind, kind), *_bounds(field)])


def _bounds(field: dict[str, Any]) -> list[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field and abs(field[key]) < 2**53]


def _default(schema: dict[str, Any], field: dict[str, Any]) -> str:
    if "default" not in field:
        return "*must be given*"
    value = field["default"]
    if isinstance(value, dict) and "$ref" in field:
        inner = schema["$defs"][field["$ref"].rsplit("/", 1)[1]]["properties"]
        changed = [f"{key}: {set_to}" for key, set_to in value.items() if inner[key].get("default") != set_to]
        return _code("{" + ", ".join(changed) + "}") if changed else "as below"
    words = {None: "null", True: "true", False: "false", "": "''"}
    return _code(words[value] if isinstance(value, str | bool | None) and value in words else str(value))


def metrics() -> str:
    """Tables of all metrics and of the kinds of wall time."""
    rows = list(metric_names.METRICS.items())
    rows.append((f"{metric_names.VALIDATION_BIN_PREFIX}NN", "held-out loss of time bin NN (00 = nearest to the data)"))
    rows += [(f"{prefix}NAME", meaning.format("NAME")) for prefix, meaning in metric_names.EPOCH_PREFIXES.items()]
    name = metric_names.evaluation_name("NAME", "FIGURE")
    rows.append((name, metric_names.describe(name)))
    wall = [(metric_names.goodput_share(kind), meaning) for kind, meaning in metric_names.WALL_TIME.items()]
    parts = []
    for title, table in (("Metrics", rows), ("Shares of the wall time", wall)):
        lines = [f"| {_code(metric)} | {_cell(_sentence(meaning))} |" for metric, meaning in table]
        parts.append("\n".join([f"## {title}\n", "| name | meaning |", "|---|---|", *lines]))
    return "\n\n".join(parts)


def tree(module: Any) -> str:
    """The docstring of a module whose text is the tree of a folder."""
    return f"```text\n{inspect.cleandoc(module.__doc__).strip()}\n```"


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _text(text: str | None) -> str:
    """Text of the code as a paragraph: names in double backquotes or single ones stay code."""
    return " ".join((text or "").replace("``", "`").split())


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", "\\|", _text(text)).replace("<", "&lt;")


def _sentence(text: str) -> str:
    """With a capital and a period; a value that is explained (`auto: ...`, `1 = ...`) keeps its spelling."""
    text = _text(text)
    if not text:
        return ""
    if not re.match(r"[\w-]+(:| =)|pomscale", text):
        text = text[0].upper() + text[1:]
    return text + ("" if text[-1] in ".!?)" else ".")


def main(arguments: list[str]) -> int:
    stale = [path for path, text in pages().items() if path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date; run `python docs/generate.py`")
        return bool(stale)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    print("written:", ", ".join(path.name for path in stale) or "nothing, all is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
