"""The command as a module: `python -m pomscale`, and for torchrun `torchrun ... -m pomscale train RECIPE`."""

from pomscale.cli import main

main()
