"""The dataset format: manifest, index, checksums and locations of shards. No torch."""
