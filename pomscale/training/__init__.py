"""Training: the life of a run, the building of a trainer, and the loop."""
