"""Start Python with SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 blocked until the program has installed its handlers.

    python -m launch.held ARGUMENTS OF PYTHON

submitit installs handlers of its own first in what it starts; they would drop a request to stop that comes early.
"""

from __future__ import annotations

import os
import sys

from launch.node.signals import block_signals

if __name__ == "__main__":
    block_signals()
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
