"""Files of a dataset: write and read shards, records and index; keep the parts of an encode; find equal keys."""
