"""Text encoders of transformers: captions to sequences of embeddings, as published pipelines make them."""
