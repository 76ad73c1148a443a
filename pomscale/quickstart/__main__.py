"""`python -m pomscale.quickstart`: the quickstart on pictures, with the mixers that are named, else with both."""

import sys

from pomscale.quickstart.images import RUNS, main

main(sys.argv[1:] or list(RUNS))
