"""Recipes: typed schema, YAML with inheritance and overrides, validation that names file, line and key."""
