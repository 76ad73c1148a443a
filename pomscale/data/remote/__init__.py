"""Shards that must be fetched before they are read: into the cache of a node, or into memory."""
