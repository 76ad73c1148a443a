"""The training reader: datasets, mixtures of them, the sample order, and the loader of micro-batches."""
