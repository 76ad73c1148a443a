"""Settings of a measured result, and which of them two results must share to lie on one curve.

A curve of FID against samples says something only if nothing but the checkpoint changes along it. So all settings are
compared but for those listed here: the checkpoint's samples and hash, locations of files (their hashes are compared),
the time and the place of the measurement, and versions of packages that neither draw nor read pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

# Of a checkpoint only the set of weights that was used is compared, without its hash.
_OF_A_CHECKPOINT = ("average", "weights", "distance")
_HASHES = frozenset({"hash", "sha256"})
_NOT_COMPARED = frozenset(
    {"path", "paths", "file", "folder", "time", "time_unix_s", "seconds", "host", "hosts", "num_ranks"}
)
# Packages that draw, decode, resize or read pictures; a patch of another one moves no figure.
_COMPARED_PACKAGES = ("pomscale", "torch", "torchvision", "transformers", "diffusers", "Pillow", "pillow")
_MOST_NAMED = 3


def compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the settings that two results on one curve share."""
    kept = {key: value for key, value in settings.items() if key not in ("checkpoint", "versions")}
    checkpoint, versions = settings.get("checkpoint"), settings.get("versions")
    if isinstance(checkpoint, Mapping):
        weights = {key: checkpoint[key] for key in _OF_A_CHECKPOINT if key in checkpoint}
        kept["checkpoint"] = {key: _without_hashes(value) for key, value in weights.items()}
    if isinstance(versions, Mapping):
        kept["versions"] = {name: versions[name] for name in _COMPARED_PACKAGES if name in versions}
    reduced: dict[str, Any] = _reduced(kept)
    return reduced


def _without_hashes(value: Any) -> Any:
    return {key: of for key, of in value.items() if key not in _HASHES} if isinstance(value, Mapping) else value


def _reduced(value: Any) -> Any:
    """Return a value without locations, with equal numbers written alike."""
    if isinstance(value, Mapping):
        return {
            str(key): _without_location(inner) if key == "spec" else _reduced(inner)
            for key, inner in value.items()
            if key not in _NOT_COMPARED
        }
    if isinstance(value, list | tuple):
        return [_reduced(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _without_location(spec: Any) -> Any:
    """Return the kind of a specification KIND:LOCATION."""
    return spec.partition(":")[0] if isinstance(spec, str) else _reduced(spec)


def result_key(settings: Mapping[str, Any]) -> str:
    """Return a short hash of all settings that two results must share to lie on one curve; "" without settings."""
    if not settings:
        return ""
    text = json.dumps(compared(settings), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted key; a list is one value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def what_differs(several: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a label for each of several settings: those compared ones that differ between them."""
    contents = [flat(compared(settings)) for settings in several]
    known = [content for content, settings in zip(contents, several, strict=True) if settings]
    keys = [
        key
        for key in dict.fromkeys(key for content in known for key in content)
        if len({json.dumps(content.get(key), sort_keys=True) for content in known}) > 1
    ]
    labels = [
        _label(content, keys) if settings else "settings not recorded"
        for content, settings in zip(contents, several, strict=True)
    ]
    # What is named first may be the same in two of them, and the rest is not named.
    return [
        label if labels.count(label) == 1 else f"{label} ({result_key(settings)})"
        for label, settings in zip(labels, several, strict=True)
    ]


def _label(content: Mapping[str, Any], keys: Sequence[str]) -> str:
    last = [key.rpartition(".")[2] for key in keys]
    names = [key if last.count(short) > 1 else short for key, short in zip(keys, last, strict=True)]
    words = [f"{name} {as_text(content.get(key))}" for name, key in zip(names, keys, strict=True)]
    more = [f"{len(words) - _MOST_NAMED} more"] if len(words) > _MOST_NAMED else []
    return ", ".join([*words[:_MOST_NAMED], *more])


def as_text(value: Any) -> str:
    """Return a setting as people read it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)
