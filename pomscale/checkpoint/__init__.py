"""Checkpoints: sharded, asynchronous, atomic. A folder is complete, with its marker, or it does not count."""
