"""A run folder: what it holds, who may write it, and how each of its starts ended. No torch."""
