"""What a dataset contains, as tables and pictures."""
