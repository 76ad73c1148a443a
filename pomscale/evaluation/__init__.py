"""Measurements of a trained model: held-out loss, recognition of generated digits, scores of VBench."""
