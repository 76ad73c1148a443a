"""Helpers of the tests: commands, small models and datasets, a SLURM cluster, a wandb server, a browser."""
