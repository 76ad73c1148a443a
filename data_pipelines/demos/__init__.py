"""Small datasets and a text encoder that need no download."""
