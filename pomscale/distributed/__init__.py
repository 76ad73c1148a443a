"""Processes and what they agree on: groups, device mesh, activation checkpointing, stop requests."""
