"""Raw dataset -> verified latent shards: sources, transforms, encoding, writing, verification."""
