"""Metrics of generated pictures and clips, from features; no network and no file is known here."""
