"""Processes of a run: their world, checks of their machines, stop requests, watchdog, activation checkpointing."""
