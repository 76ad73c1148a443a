"""Turn raw datasets into verified shards of latents and embeddings, and inspect, repair, merge and split those."""
