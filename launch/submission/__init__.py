"""Recipe and cluster profile to a checked, frozen and submitted job."""
