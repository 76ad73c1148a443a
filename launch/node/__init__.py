"""Processes of a job on its nodes: guards, supervisor and verdict."""
