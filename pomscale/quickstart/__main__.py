"""`python -m pomscale.quickstart [MIXER ...]`: the quickstart on pictures, by default with both mixers."""

import sys

from pomscale.quickstart.images import RUNS, main

main(sys.argv[1:] or list(RUNS))
