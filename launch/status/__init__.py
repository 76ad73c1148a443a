"""Runs as their folders and SLURM show them: tables, status, logs, differences."""
