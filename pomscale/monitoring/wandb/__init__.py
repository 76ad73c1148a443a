"""View of a run in wandb: its wandb run, and the sink that logs into it."""
