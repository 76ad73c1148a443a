"""Writing and reading the records of shards."""
