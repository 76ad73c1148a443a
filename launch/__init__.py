"""Recipe + cluster profile -> SLURM jobs. The room of `pomscale launch` and `pomscale runs`."""
