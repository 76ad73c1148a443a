"""The check of a cluster against its profile."""
