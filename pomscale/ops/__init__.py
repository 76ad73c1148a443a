"""Operators: pure functions of tensors, without parameters, models or process groups."""
