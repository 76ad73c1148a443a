"""Pictures as sources: where they lie, how they are read, and a small real set to start with."""
