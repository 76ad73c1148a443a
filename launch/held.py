"""Python, in which requests to stop wait until the program can tell what to do with them.

    python -m launch.held ARGUMENTS OF PYTHON

submitit's own handlers, which come first in what it starts, would drop them.
"""

from __future__ import annotations

import os
import sys

from launch.node.signals import block_signals

if __name__ == "__main__":
    block_signals()
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
