"""Trained weights for use: cards, exported folders, loading, averages and foreign formats."""
