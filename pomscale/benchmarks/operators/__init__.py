"""Benchmarks of the mixer beside bare matrix products, the authors' layers, attention and a compiled plain form."""
