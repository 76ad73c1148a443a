"""Small datasets and encoders that need no download."""
