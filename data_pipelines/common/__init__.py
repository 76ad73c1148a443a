"""Encoding, writing, verifying and showing shards, whatever the modality."""
