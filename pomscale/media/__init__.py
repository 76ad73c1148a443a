"""Decoding and encoding of pictures and clips."""
