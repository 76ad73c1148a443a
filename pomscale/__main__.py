"""`python -m pomscale`, which is also how torchrun starts training: `torchrun ... -m pomscale train RECIPE`."""

from pomscale.cli import main

main()
