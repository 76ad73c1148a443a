"""Datasets made from other datasets (merge, split), and the table that joins two of them."""
