"""Latent shards: the contract (schema), the index, the sample order, the dataset and the loader."""
