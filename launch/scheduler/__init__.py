"""The scheduler: adapters over the commands of SLURM."""
