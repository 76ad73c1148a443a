"""A training step run with sizes alone, without torch, to find what torch would allocate, keep and free."""
