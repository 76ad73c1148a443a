"""`python -m pomscale.experiments.recall --out FILE [a.b=c ...]`: train a network on recall, and measure it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pomscale.base.errors import PomscaleError
from pomscale.base.files import check_can_be_written
from pomscale.distributed.world import resolve_device
from pomscale.experiments.recall.config import read_recall
from pomscale.experiments.recall.train import train_recall


def main(arguments: list[str] | None = None) -> int:
    """Train and measure; the exit code, as `pomscale` has them."""
    parser = argparse.ArgumentParser(prog="python -m pomscale.experiments.recall", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file that receives the figures")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="Changes to the settings, such as num_pairs=64")
    parsed = parser.parse_args(arguments)
    try:
        config = read_recall(parsed.overrides)
        check_can_be_written(parsed.out)
        train_recall(config, parsed.out, resolve_device("auto"))
    except PomscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
