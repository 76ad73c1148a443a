"""Engines: how a model is sharded, stepped and saved. They never know which model it is."""
