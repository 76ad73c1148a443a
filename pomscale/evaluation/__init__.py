"""Measuring a model: held-out loss, generation over ranks, recognisability."""
