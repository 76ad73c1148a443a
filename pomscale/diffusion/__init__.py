"""Objectives with their paths and loss, random draws, guidance and samplers. The network is any callable."""
