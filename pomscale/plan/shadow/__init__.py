"""The step of a network, run with sizes alone: what torch allocates, keeps and frees. No torch in here."""
