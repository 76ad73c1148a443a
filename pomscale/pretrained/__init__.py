"""Trained weights for use: model cards, exported folders, loading, post-hoc averages and foreign formats."""
