"""Verification and repair of datasets."""
