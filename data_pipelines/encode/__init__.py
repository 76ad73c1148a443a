"""Encoding: any number of tasks turn the items of a source into the shards of datasets."""
