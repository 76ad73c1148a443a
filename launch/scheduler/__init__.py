"""The scheduler: what SLURM is asked and told."""
