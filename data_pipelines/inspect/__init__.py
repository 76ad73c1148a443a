"""Descriptions of a dataset for people: tables, pictures and measured distributions."""
