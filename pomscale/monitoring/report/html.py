"""HTML elements of the report's pages, which load nothing and have every text escaped."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

# A larger clip is named instead of shown: browsers cannot show pages of hundreds of megabytes.
MAX_CLIP_BYTES = 8 << 20
MISSING = "–"

_MEDIA_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
}

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f9; color: #1f2733; font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 16px 48px; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 36px 0 12px; font-size: 1.1rem; }
h3 { margin: 18px 0 8px; font-size: .95rem; overflow-wrap: anywhere; }
.sub { margin: 4px 0 20px; color: #5f6b7a; }
.badge { display: inline-block; margin-left: 8px; padding: 2px 10px; border-radius: 99px; background: #e3ebf8;
         color: #1f4e98; font-size: .8rem; font-weight: 600; vertical-align: middle; }
.note { margin: 0 0 12px; padding: 8px 12px; border-left: 3px solid #d55e00; background: #fff;
        overflow-wrap: anywhere; }
.legend { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 16px;
          padding: 10px 14px; border: 1px solid #e3e7ed; border-radius: 10px; background: #fff; font-size: .88rem; }
.legend span { overflow-wrap: anywhere; }
.key { flex: none; display: inline-block; width: 22px; height: 0; margin-right: 7px; vertical-align: middle; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 12px; }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); gap: 12px; }
.card, .tile, figure { margin: 0; padding: 12px; border: 1px solid #e3e7ed; border-radius: 10px; background: #fff; }
.card { overflow-x: auto; }
.card + .card { margin-top: 12px; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span, figcaption { color: #5f6b7a; font-size: .82rem; overflow-wrap: anywhere; }
figcaption { margin-top: 6px; }
figcaption ol { margin: 4px 0 0; padding-left: 1.6em; }
img, video { display: block; width: 100%; height: auto; }
img.small { image-rendering: pixelated; }
table { width: 100%; border-collapse: collapse; font-size: .88rem; }
td, th { padding: 5px 12px 5px 0; border-bottom: 1px solid #eef1f5; text-align: left; vertical-align: top; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
th { color: #5f6b7a; font-weight: 600; }
thead th { border-bottom: 2px solid #e3e7ed; vertical-align: bottom; }
.keys th { width: 25%; min-width: 8em; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { display: block; color: #5f6b7a; }
.keys td { overflow-wrap: anywhere; }
.beside td, .beside th { min-width: 6.5em; max-width: 22em; overflow-wrap: anywhere; }
.beside th { white-space: normal; }
.beside td:first-child, .beside th:first-child { position: sticky; left: 0; min-width: 8.5em; background: #fff; }
@media (min-width: 700px) {
  .beside td:first-child, .beside th:first-child { min-width: 18em; }
  figure:has(video) { grid-column: span 2; } /* room for its rows and its controls */
}
figure + .card, .card + .grids, details + .grids { margin-top: 12px; }
summary { margin-top: 12px; cursor: pointer; color: #1f4e98; }
pre { margin: 0; font: .82rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """Return a page, whose content security policy forbids all but inline styles and inline pictures and clips."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'\">\n"
        # Browsers ask every site for an icon, which the policy would make an error.
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)} · pomscale report</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """Return a section; nothing for an empty body."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def tiles(shown: Iterable[tuple[str, str]]) -> str:
    """Return tiles of (label, value) pairs."""
    cells = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in shown)
    return f'<div class="tiles">{"".join(cells)}</div>'


def note(text: str) -> str:
    """Return a note; nothing for an empty text."""
    return f'<p class="note">{escape(text)}</p>' if text else ""


def grid(kind: str, figures: Sequence[str]) -> str:
    """Return figures in a grid of one of two kinds: "plots", or "grids", which are smaller."""
    return f'<div class="{kind}">{"".join(figures)}</div>' if figures else ""


def plot(png: bytes, alt: str) -> str:
    """Return a plot, with a description for people who cannot see it."""
    return _figure(_image(png, "image/png", alt), "")


def without_posters(media: Iterable[Path]) -> list[Path]:
    """Return `media` without the pictures that are the poster of a clip among them: NAME.png of NAME.mp4."""
    media = list(media)
    posters = {poster_of(path) for path in media if is_clip(path)}
    return [path for path in media if path not in posters]


def is_clip(path: Path) -> bool:
    """Whether a file is a clip, by its suffix."""
    return _MEDIA_TYPES[path.suffix.lower()].startswith("video/")


def poster_of(clip: Path) -> Path:
    """Return the path of a clip's poster, the picture that is shown before it is played; the file may be missing."""
    return clip.with_suffix(".png")


def medium(path: Path, caption: str, rows: Sequence[str] = ()) -> str:
    """Return a picture, or a clip with its poster, from disk; a file that is gone or too large is only named.

    `rows` describes the rows of the picture or clip, from the top.
    """
    content, problem = _read(path)
    full_caption = f"{caption}: {problem}" if problem else caption
    shown = ""
    if is_clip(path):
        poster, _ = _read(poster_of(path))
        if content:
            still = f' poster="{_data(poster, "image/png")}"' if poster else ""
            source = _data(content, _MEDIA_TYPES[path.suffix.lower()])
            shown = f'<video controls loop muted playsinline preload="metadata"{still} src="{source}"></video>'
        elif poster:
            shown = _image(poster, "image/png", caption)
    elif content:
        shown = _image(content, _MEDIA_TYPES[path.suffix.lower()], caption)
    return _figure(shown, full_caption, rows)


def _read(path: Path) -> tuple[bytes, str]:
    """Return the content of a file, and the reason why there is none, which is empty where there is content."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_CLIP_BYTES:
            return b"", f"{num_bytes / 2**20:.0f} MiB, see {path}"
        content = path.read_bytes()
    except OSError as error:
        return b"", error.strerror or str(error)
    return content, "" if content else "empty"


def _image(content: bytes, media_type: str, alt: str) -> str:
    width = int.from_bytes(content[16:20], "big") if media_type == "image/png" else None  # from the PNG header
    kind = ' class="small"' if width and width < 400 else ""  # tiny pictures are enlarged: show pixels, no blur
    return f'<img{kind} src="{_data(content, media_type)}" alt="{escape(alt)}">'


def _data(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def _figure(body: str, caption: str, rows: Sequence[str] = ()) -> str:
    listed = "".join(f"<li>{escape(row)}</li>" for row in rows)
    text = escape(caption) + (f"<ol>{listed}</ol>" if listed else "")
    return f"<figure>{body}{f'<figcaption>{text}</figcaption>' if text else ''}</figure>"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int | None = None, wide: bool = False
) -> str:
    """Return a table; nothing without rows.

    Args:
        head: headings of the columns.
        rows: cells, which are text, or HTML made by `described`.
        numbers_from: first column that holds numbers.
        wide: the table has a column per run or figure; the first stays in view when the others are scrolled.
    """
    if not rows:
        return ""

    def kind(at: int) -> str:
        return ' class="number"' if numbers_from is not None and at >= numbers_from else ""

    headings = "".join(f'<th scope="col"{kind(at)}>{_cell(cell)}</th>' for at, cell in enumerate(head))
    lines = ("".join(f"<td{kind(at)}>{_cell(cell)}</td>" for at, cell in enumerate(row)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    card = "card beside" if wide else "card"
    return f'<div class="{card}"><table><thead><tr>{headings}</tr></thead><tbody>{body}</tbody></table></div>'


class Html(str):
    """Text that is HTML already, and not escaped again."""


def described(text: str, description: str) -> Html:
    """Return a cell with a description in small print below the text."""
    return Html(escape(text) + (f"<small>{escape(description)}</small>" if description else ""))


def _cell(text: str) -> str:
    return text if isinstance(text, Html) else escape(text)


def key_values(content: Mapping[str, Any]) -> str:
    """Return a table of keys and values; keys of inner objects are joined by dots."""
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in flatten(content)
    )
    return f'<div class="card keys"><table>{rows}</table></div>' if rows else ""


def preformatted(text: str) -> str:
    """Return a text with its line breaks and spaces."""
    return f'<div class="card"><pre>{escape(text)}</pre></div>'


def folded(title: str, body: str) -> str:
    """Return a body that a click opens; nothing for an empty one."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if body else ""


def flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return dotted keys and values as text."""
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def utc(time_unix_s: float) -> str:
    """Return a moment as text, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time_unix_s))
