"""Foundations that every package may use: errors, files, console, clock, keyed random numbers."""
