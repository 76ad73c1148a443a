"""Benchmarks: each measures against a named rival in the same run, on checked results."""
