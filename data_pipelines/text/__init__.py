"""Clips: from a video file to frames of one size, evenly spaced in time."""
