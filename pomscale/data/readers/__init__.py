"""Readers of arrays and text embeddings from the bytes of shards."""
