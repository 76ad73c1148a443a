"""The videos that VBench needs: their prompts, numbers and names, and the manifest that says what made them.

VBench (Huang et al. 2024; github.com/Vchitect/VBench at 45e79ec) looks for f"{prompt}-{index}{suffix}" with index 0 to
4, and takes the suffix of the name that the folder lists first (vbench/__init__.py): hence a folder of videos alone.
It asks for 5 videos of a prompt, and for 25 of those for temporal flickering, from which its static_filter.py
chooses; each with a seed of its own, which is recorded (prompts/README.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError
from pomscale.base.files import write_text

MANIFEST, VIDEOS = "manifest.json", "videos"
NUM_VIDEOS, NUM_FLICKERING_VIDEOS = 5, 25

_FLICKERING = "temporal_flickering"
_MOST_NAME_BYTES = 255  # of a file, on the file systems of Linux


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the number of its videos, which are named after it."""

    text: str
    num_videos: int


@dataclass(frozen=True)
class Video:
    """A video: its prompt, the name of its file, and its seed."""

    prompt: str
    name: str
    seed: int


def read_prompts(path: Path, num: int | None = None) -> list[Prompt]:
    """Read the prompts of a text file with a prompt per line, or of VBench_full_info.json.

    A prompt that is there twice counts once, since its videos have the same names; VBench's own list has two such.

    Args:
        path: The file.
        num: Videos of each prompt; None = as VBench asks, which for temporal flickering only its JSON says.

    Returns:
        The distinct prompts in their order.

    Raises:
        InputError: There are none, or one cannot be part of a file's name, so that VBench would not find its videos.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows puts a mark before the first line
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: prompts cannot be read: {error}") from error
    found = _of_full_info(path, text) if path.suffix == ".json" else _of_lines(text)
    wanted: dict[str, int] = {}
    for location, prompt, asked in found:
        num_videos = max(num or asked, wanted.get(prompt, 0))
        _check_name(f"{path}: {location}", prompt, num_videos)
        wanted[prompt] = num_videos
    if not wanted:
        raise InputError(f"{path}: there is no prompt in it; give a prompt per line, or VBench_full_info.json")
    return [Prompt(*item) for item in wanted.items()]


def _of_lines(text: str) -> Iterator[tuple[str, str, int]]:
    """Yield (location, prompt, number of videos); prompts are stripped, as VBench's own sampling code does."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", line.strip(), NUM_VIDEOS


def _of_full_info(path: Path, text: str) -> Iterator[tuple[str, str, int]]:
    """Yield (location, prompt, number of videos)."""
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        match entry:
            case {"prompt_en": str(prompt), "dimension": list(dimensions)} if prompt.strip():
                num_videos = NUM_FLICKERING_VIDEOS if _FLICKERING in dimensions else NUM_VIDEOS
                yield f"entry {number}", prompt, num_videos
            case _:
                raise InputError(
                    f"{path}: entry {number} has no prompt_en and dimension; give VBench_full_info.json, "
                    "or a text file with a prompt per line"
                )


def _check_name(location: str, prompt: str, num_videos: int) -> None:
    try:
        num_bytes = len(_name(prompt, num_videos - 1).encode())
    except UnicodeEncodeError as error:
        raise InputError(f"{location}: the prompt is no valid Unicode, and cannot name a file: {error}") from error
    if "/" in prompt or "\0" in prompt:
        raise InputError(f"{location}: {prompt!r} has a slash or a NUL, which a file name cannot have")
    if num_bytes > _MOST_NAME_BYTES:
        raise InputError(
            f"{location}: {prompt[:40]!r}... makes a file name of {num_bytes} bytes; the most is {_MOST_NAME_BYTES}; "
            "VBench finds videos by the names of its own prompts, which are shorter"
        )


def video_seed(seed: int, prompt: str, index: int) -> int:
    """Return the seed of video `index` of a prompt, below 2**48.

    It depends on these three alone, and not on the prompt's position: the same prompt in another list gives the same
    video.
    """
    digest = hashlib.sha256(f"{seed} {index} {prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _name(prompt: str, index: int) -> str:
    return f"{prompt}-{index}.mp4"


def list_videos(prompts: Sequence[Prompt], seed: int) -> list[Video]:
    """Return all videos of a suite, prompt by prompt."""
    return [
        Video(prompt.text, _name(prompt.text, index), video_seed(seed, prompt.text, index))
        for prompt in prompts
        for index in range(prompt.num_videos)
    ]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of `folder`. Raise InputError if it has none."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); give the --out-dir of a `pomscale sample --vbench`"
        ) from error
    if not isinstance(manifest, dict) or not {"model", "sampling", "videos"} <= manifest.keys():
        raise InputError(f"{path}: was not written by `pomscale sample --vbench`")
    return manifest


def claim(folder: Path, made_by: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Write the manifest of `folder`, unless it has one, and `check` it; `more` holds entries that may differ."""
    if not (folder / MANIFEST).exists():
        write_text(folder / MANIFEST, json.dumps({**made_by, **more}, indent=1, ensure_ascii=False))
    check(folder, made_by)


def check(folder: Path, made_by: Mapping[str, Any]) -> None:
    """Raise InputError if `folder` has videos that were made in another way.

    `made_by` has the entries "model", "sampling" and "videos" of the manifest.
    """
    if not (folder / MANIFEST).exists():
        if any((folder / VIDEOS).glob("*")):
            raise InputError(f"{folder / VIDEOS}: has files, but no {MANIFEST} says what made them; use another folder")
        return
    now, then = json.loads(json.dumps(made_by)), read_manifest(folder)
    differences = [
        f"{key} {then[part].get(key)!r} there and {now[part].get(key)!r} now"
        for part in ("model", "sampling")
        for key in {**then[part], **now[part]}
        if then[part].get(key) != now[part].get(key)
    ]
    if then["videos"] != now["videos"] and not differences:
        differences = [f"{len(then['videos']):,} videos of other prompts there and {len(now['videos']):,} now"]
    if differences:
        raise InputError(
            f"{folder}: its videos were made in another way: {'; '.join(differences)}. Use another folder, or "
            f"the model and the options of {folder / MANIFEST}"
        )
