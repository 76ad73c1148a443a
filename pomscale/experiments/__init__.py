"""Experiments: grids of runs and commands that end in a table and a plot, by the usual commands."""
