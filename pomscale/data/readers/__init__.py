"""Readers of arrays and text embeddings out of shards."""
