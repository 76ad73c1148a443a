"""Sampling from trained models: pictures, clips, streams and the videos that VBench measures."""
