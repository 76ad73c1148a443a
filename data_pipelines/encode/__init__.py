"""Encoding: items of a source become shards, by any number of tasks."""
