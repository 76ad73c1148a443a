"""Datasets made of other datasets: merge, split, join."""
