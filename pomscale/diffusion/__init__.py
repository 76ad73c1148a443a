"""Paths, objectives, guidance and samplers. The network is a callable to this room."""
