"""Numbers as people read them, the same on the console and in the report; and lines that cost no run."""

from __future__ import annotations

import sys
from contextlib import suppress


def say(line: str) -> None:
    """On the console. A job's log may lie on a full disk, or its reader have gone: that is no reason to end."""
    with suppress(OSError):
        print(line, flush=True)


def warn(line: str) -> None:
    """The same on standard error."""
    with suppress(OSError):
        print(f"warning: {line}", file=sys.stderr, flush=True)


def format_count(count: float) -> str:
    """A count with three significant digits: 950, 8.19k, 1.28M, 2.5B."""
    for factor, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999.5 thousand would round to "1e+03k": it belongs to the next unit.
        if abs(count) >= 0.9995 * factor:
            return f"{count / factor:.3g}{suffix}"
    return f"{count:.3g}"


def format_age(then_unix_s: float, now_unix_s: float) -> str:
    """How long ago that was; clocks of other hosts may be ahead."""
    return f"{format_duration(max(0.0, now_unix_s - then_unix_s))} ago"


def format_duration(seconds: float) -> str:
    """The two largest units of a duration: 42s, 3m 20s, 5h 07m, 2d 04h."""
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    if minutes:
        return f"{minutes}m {total % 60:02d}s"
    return f"{total}s"
