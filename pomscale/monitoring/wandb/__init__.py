"""wandb as one view of a run."""
