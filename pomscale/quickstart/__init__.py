"""Quickstarts: the whole life of a run on a laptop's CPU, by the usual commands."""
