"""Pipelines and sweeps: several jobs of one recipe."""
