"""Shards behind URLs: fetched, cached on the node, or streamed."""
