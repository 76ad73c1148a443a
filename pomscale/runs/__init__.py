"""A run folder: its files, the start that may write it, and how each of its starts ended. No torch."""
